// The Python module tallcodec._core: checks, releases the GIL, calls, maps the error. Nothing else.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "decode.h"
#include "encode.h"
#include "extend.h"
#include "format.h"
#include "gil.h"
#include "kernels.h"
#include "text.h"

namespace py = pybind11;

void bind_kernels(py::module_& m);  // binding_kernels.cpp
void bind_gpu(py::module_& m);      // binding_gpu.cpp

namespace tallcodec {
namespace {

// The class of tallcodec.errors that stands for a status.
const char* exception_name(Status status) {
  switch (status) {
    case Status::Argument: return "ArgumentError";
    case Status::Checkpoint: return "CheckpointError";
    case Status::Format: return "FormatError";
    case Status::Version: return "VersionError";
    case Status::Checksum: return "ChecksumError";
    case Status::BaseMismatch: return "BaseMismatchError";
    case Status::TaskNotFound: return "TaskNotFoundError";
    case Status::TensorNotFound: return "TensorNotFoundError";
    case Status::Read: return "ReadError";
    case Status::Write: return "WriteError";
    case Status::Device: return "DeviceError";
  }
  return "TallcodecError";
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& e) {
    py::object type = py::module_::import("tallcodec.errors").attr(exception_name(e.status));
    py::object value = e.system_error ? type(e.system_error, e.message) : type(e.message);
    PyErr_SetObject(type.ptr(), value.ptr());
  }
}

// A Python source is (file descriptor, offset), or (-1, address), or None.
Source source(const py::object& o) {
  if (o.is_none()) return {};
  auto [fd, where] = o.cast<std::pair<int, uint64_t>>();
  if (fd < 0) return {reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(where)), -1, 0};
  return {nullptr, fd, where};
}

// Lets Ctrl-C through, and calls `progress(step, done, total)`, if it is not None, at most some twenty times
// a second and when a step is done.
auto poll_signals(py::object progress) {
  auto last = std::make_shared<std::chrono::steady_clock::time_point>();
  return [last, progress](const char* step, uint64_t done, uint64_t total) {
    auto now = std::chrono::steady_clock::now();
    if (now - *last < std::chrono::milliseconds(50) && (done < total || progress.is_none())) return;
    *last = now;
    with_gil([&] {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress.is_none()) progress(step, done, total);
    });
  };
}

// `inflate(frame, raw_size) -> bytes, or None where the frame is not sound`, as the core calls it,
// from any thread.
auto inflate_with(py::object inflate) {
  return [inflate](const uint8_t* data, uint64_t size, uint8_t* out, uint64_t raw_size) {
    with_gil([&] {
      auto frame = py::memoryview::from_memory(data, static_cast<py::ssize_t>(size));
      py::object raw = inflate(frame, raw_size);
      if (!py::isinstance<py::bytes>(raw) || py::len(raw) != raw_size) {
        throw Error(Status::Format, text("no sound zstd frame of ", raw_size, " bytes"));
      }
      std::memcpy(out, PyBytes_AS_STRING(raw.ptr()), raw_size);
    });
  };
}

Options options(unsigned threads, bool verify, py::object inflate, py::object progress = py::none()) {
  Options o;
  o.threads = threads;
  o.verify = verify;
  o.poll = poll_signals(std::move(progress));
  if (!inflate.is_none()) o.inflate = inflate_with(std::move(inflate));
  return o;
}

// A File over anything with the buffer interface, which it keeps.
class BufferFile {
 public:
  BufferFile(std::string label, const py::buffer& buffer)
      : buffer_(buffer),
        fetch_([data = buffer_.data()](uint64_t offset, uint64_t) { return data + offset; }),
        file_(std::move(label), buffer_.size(), fetch_) {}
  const File& operator*() const { return file_; }
  const File* operator->() const { return &file_; }
  const Index& index() const { return file_.index(); }
  const File::Fetch& fetch() const { return fetch_; }
  std::pair<uintptr_t, uint64_t> memory() const {
    return {reinterpret_cast<uintptr_t>(buffer_.data()), buffer_.size()};
  }

 private:
  Buffer buffer_;
  File::Fetch fetch_;
  File file_;
};

py::str string(const Index& index, StringRef s) {
  std::string_view v = index.text(s);
  return py::str(v.data(), v.size());
}

py::tuple shape(const uint64_t* dims, size_t rank) {
  py::tuple t(rank);
  for (size_t i = 0; i < rank; ++i) t[i] = dims[i];
  return t;
}

py::object optional(uint32_t id) { return id == kNone ? py::none() : py::object(py::int_(id)); }

py::dict header(const BufferFile& f) {
  const IndexHeader& h = f.index().header;
  py::dict d;
  d["writer"] = string(f.index(), h.writer);
  d["base_storage"] = int(h.base_storage);
  d["merge"] = int(h.merge);
  d["scale"] = int(h.scale);
  return d;
}

py::list tasks(const BufferFile& f) {
  py::list out;
  for (const TaskRecord& t : f.index().tasks) {
    py::dict d;
    d["name"] = string(f.index(), t.name);
    d["threshold"] = t.threshold;
    d["method"] = int(t.method);
    out.append(d);
  }
  return out;
}

py::list tensors(const BufferFile& f) {
  py::list out;
  const Index& index = f.index();
  for (const TensorRecord& t : index.tensors) {
    py::dict d;
    d["name"] = string(index, t.name);
    d["in_base"] = bool(t.in_base);
    d["dtype"] = int(t.dtype);
    d["shape"] = shape(index.dims.data() + t.dims, t.rank);
    d["shared_dtype"] = int(t.shared_dtype);
    d["alias"] = optional(t.alias);
    py::list counts;
    for (uint32_t i = 0; i < t.count_count; ++i) counts.append(index.counts[t.first_count + i]);
    d["agreement"] = counts;
    out.append(d);
  }
  return out;
}

py::list entries(const BufferFile& f, uint32_t task) {
  py::list out;
  const Index& index = f.index();
  if (task >= index.tasks.size()) throw py::index_error();
  for (uint32_t i = 0; i < index.tensors.size(); ++i) {
    const EntryRecord& e = index.entry(task, i);
    py::dict d;
    d["coding"] = int(e.coding);
    d["dtype"] = int(e.dtype);
    d["reason"] = int(e.reason);
    d["plane"] = optional(e.plane);
    d["scales_plane"] = optional(e.scales_plane);
    d["scale"] = e.scale;
    d["factor"] = e.factor;
    d["set_bits"] = e.set_bits;
    d["published_bits"] = e.published_bits;
    d["tau_sq"] = e.tau_sq;
    d["dot"] = e.dot;
    d["approx_sq"] = e.approx_sq;
    out.append(d);
  }
  return out;
}

py::list planes(const BufferFile& f) {
  py::list out;
  for (const PlaneRecord& p : f.index().planes) {
    out.append(py::make_tuple(int(p.kind), int(p.coding), p.offset, p.size, p.raw_size));
  }
  return out;
}

py::list files(const BufferFile& f) {
  py::list out;
  for (const FileRecord& r : f.index().files) {
    out.append(py::make_tuple(r.scope, string(f.index(), r.name), optional(r.plane)));
  }
  return out;
}

py::list metadata(const BufferFile& f) {
  py::list out;
  for (const MetaRecord& r : f.index().metas) {
    out.append(py::make_tuple(r.scope, string(f.index(), r.key), string(f.index(), r.value)));
  }
  return out;
}

// From tuples of task, tensor, address, base and, of a part, its first element and how many.
std::vector<Request> requests_of(const py::list& wanted) {
  std::vector<Request> requests;
  for (const py::handle& item : wanted) {
    auto t = item.cast<py::tuple>();
    requests.push_back({t[0].cast<uint32_t>(), t[1].cast<uint32_t>(),
                        reinterpret_cast<void*>(t[2].cast<uintptr_t>()), source(t[3])});
    if (t.size() > 4) {
      requests.back().first = t[4].cast<uint64_t>();
      requests.back().count = t[5].cast<uint64_t>();
    }
  }
  return requests;
}

void decode(const BufferFile& f, const py::list& wanted, unsigned threads, bool verify,
            py::object inflate, const Loaded* loaded) {
  const std::vector<Request> requests = requests_of(wanted);
  Options o = options(threads, verify, std::move(inflate));
  o.loaded = loaded;
  WithoutGil released;
  f->decode(requests, o);
}

Loaded load(const BufferFile& f, uint32_t task, const py::list& wanted, unsigned threads,
            py::object inflate) {
  const std::vector<Request> requests = requests_of(wanted);
  Options o = options(threads, true, std::move(inflate));
  WithoutGil released;
  return f->load(task, requests, o);
}

DevicePlan device_plan(const BufferFile& f, const py::list& wanted, const std::set<uint32_t>& there,
                       unsigned threads, bool verify, py::object inflate) {
  const std::vector<Request> requests = requests_of(wanted);
  const Options o = options(threads, verify, std::move(inflate));
  WithoutGil released;
  Decoder decoder(*f, f.fetch(), o);
  std::vector<Job> jobs;
  for (const Request& request : requests) {
    f->info(request.task, request.tensor);  // refuses what is absent or of a newer writer
    jobs.push_back(decoder.job(request));
  }
  return decoder.device_plan(jobs, there);
}

// (plane, address, bytes), the address 0 where the device has it.
py::object device_plane(const DevicePlane& p) {
  if (p.id == kNone) return py::none();
  return py::make_tuple(p.id, reinterpret_cast<uintptr_t>(p.bytes), p.size);
}

py::list device_tensors(const DevicePlan& plan) {
  py::list out;
  for (const DeviceTensor& t : plan.tensors) {
    py::dict d;
    d["coding"] = int(t.coding);
    d["base_dtype"] = int(t.block.base_dtype);
    d["shared_dtype"] = int(t.block.shared_dtype);
    d["scale"] = t.block.scale;
    d["row_length"] = t.row_length;
    d["first"] = t.first;
    d["end"] = t.end;
    d["start"] = t.start;
    d["stop"] = t.stop;
    d["copied"] = device_plane(t.copied);
    d["base"] = device_plane(t.base);
    d["shared"] = device_plane(t.shared);
    d["shared_scales"] = device_plane(t.shared_scales);
    d["mask"] = device_plane(t.mask);
    d["signs"] = device_plane(t.signs);
    d["row_scales"] = device_plane(t.row_scales);
    d["coded"] = device_plane(t.coded);
    d["head"] = t.head;
    d["slots"] = py::none();
    if (t.ternary) {
      std::vector<uint64_t> slots;
      for (uint32_t i = 0; i < 1u << kTernarySlotBits; ++i) slots.push_back(t.ternary->slot(i));
      d["slots"] = py::bytes(reinterpret_cast<const char*>(slots.data()), 8 * slots.size());
    }
    out.append(d);
  }
  return out;
}

void merge(const BufferFile& f, const py::list& wanted, uint32_t min_tasks, float scale,
           unsigned threads, bool verify, py::object progress) {
  const std::vector<Request> requests = requests_of(wanted);
  Options o = options(threads, verify, py::none(), std::move(progress));
  WithoutGil released;
  f->merge(requests, {min_tasks, scale}, o);
}

py::list count_masks(const BufferFile& f, const std::vector<uint32_t>& tensors, unsigned threads,
                     bool verify, py::object progress) {
  Options o = options(threads, verify, py::none(), std::move(progress));
  std::vector<MaskCounts> counts;
  {
    WithoutGil released;
    counts = f->count_masks(tensors, o);
  }
  py::list out;
  for (const MaskCounts& c : counts) {
    py::dict d;
    d["tasks"] = c.tasks;
    d["zeros"] = c.zeros;
    d["agreement"] = c.agreement;
    d["overlap"] = c.overlap;
    out.append(d);
  }
  return out;
}

py::bytes read_plane(const BufferFile& f, uint32_t plane, py::object inflate) {
  if (plane >= f.index().planes.size()) throw py::index_error();
  Options o = options(1, true, std::move(inflate));
  std::vector<uint8_t> out;
  {
    WithoutGil released;
    out = f->read_plane(plane, o);
  }
  return py::bytes(reinterpret_cast<const char*>(out.data()), out.size());
}

py::list verify(const BufferFile& f, unsigned threads, py::object progress) {
  Options o = options(threads, true, py::none(), std::move(progress));
  std::vector<Damage> damage;
  {
    WithoutGil released;
    damage = f->verify(o);
  }
  py::list out;
  for (const Damage& d : damage) out.append(py::make_tuple(d.plane, d.block));
  return out;
}

}  // namespace
}  // namespace tallcodec

PYBIND11_MODULE(_core, m) {
  using namespace tallcodec;
  KnownThread::keep_from_forks();
  py::register_exception_translator(translate);
  m.attr("NONE") = kNone;
  m.attr("SCOPE_BASE") = kScopeBase;
  m.attr("SCOPE_FILE") = kScopeFile;
  bind_kernels(m);
  bind_gpu(m);
  m.def("same_bytes", [](const py::object& a, const py::object& b, uint64_t size) {
    Source x = source(a), y = source(b);
    WithoutGil released;
    return same_bytes(x, y, size);
  });
  m.def("advise_huge", [](uintptr_t address, uint64_t size) {
    // Only a hint, and of whole pages: what the kernel makes of it is its own affair.
    const uintptr_t page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (address + page - 1) / page * page, end = (address + size) / page * page;
#ifdef MADV_HUGEPAGE
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  });
  // Of a header: each slot's (whether it is right, sequence, index offset, size and hash, file size); None of an empty
  // one.
  m.def("slots", [](const py::bytes& bytes) {
    const std::string_view data = bytes;
    Header header{};
    std::memcpy(&header, data.data(), std::min(data.size(), sizeof header));
    py::list slots;
    for (const Slot& s : header.slot) {
      const Slot empty{};
      if (std::memcmp(&s, &empty, sizeof s) == 0) {
        slots.append(py::none());
      } else {
        slots.append(py::make_tuple(is_right(header, s), s.sequence, s.index_offset, s.index_size, s.index_hash,
                                    s.file_size));
      }
    }
    return slots;
  });
  m.def("read_source", [](const py::object& from, uint64_t size) {
    std::vector<uint8_t> buffer;
    return py::bytes(reinterpret_cast<const char*>(source(from).view(0, size, buffer)), size);
  });

  py::class_<Encoder>(m, "Encoder")
      .def(py::init([](int fd, std::string label, std::string writer, int merge, int method,
                       double density, int scale, int storage, bool least_bits,
                       bool code_masks, bool code_ternary, uint32_t trials) {
             const Recipe recipe{Merge(merge),         Method(method), density,
                                 ScaleMode(scale),     BaseStorage(storage),
                                 least_bits,           code_masks,
                                 code_ternary,         trials};
             return new Encoder(fd, std::move(label), std::move(writer), recipe);
           }),
           py::arg("fd"), py::arg("label"), py::arg("writer"), py::kw_only(), py::arg("merge"),
           py::arg("method"), py::arg("density"), py::arg("scale"), py::arg("base_storage"),
           py::arg("least_bits") = false, py::arg("code_masks") = false,
           py::arg("code_ternary") = true, py::arg("trials") = 1)
      .def("keep_journal", &Encoder::keep_journal)
      .def("extend", &Encoder::extend, py::call_guard<WithoutGil>())
      .def("set_base", [](Encoder& e, uint32_t tensor, const py::object& from) { e.set_base(tensor, source(from)); })
      .def("check_stored",
           [](const Encoder& e, unsigned threads, py::object progress) {
             Options o = options(threads, true, py::none(), std::move(progress));
             WithoutGil released;
             e.check_stored(o);
           })
      .def("withdraw", &Encoder::withdraw)
      .def("cost",
           [](const Encoder& e, uint32_t task) {
             const Encoder::Cost c = e.cost(task);
             return py::make_tuple(c.bits, c.elements, c.tau_sq, c.error_sq);
           })
      .def("add_task", &Encoder::add_task)
      .def("add_tensor",
           [](Encoder& e, std::string name, bool in_base, int dtype, std::vector<uint64_t> shape,
              int shared_dtype, const py::object& base, uint32_t alias) {
             return e.add_tensor(std::move(name), in_base, DType(dtype), std::move(shape),
                                 DType(shared_dtype), source(base), alias);
           })
      .def("set_entry",
           [](Encoder& e, uint32_t task, uint32_t tensor, int coding, int dtype,
              std::vector<uint64_t> shape, int reason, const py::object& from) {
             e.set_entry(task, tensor, Coding(coding), DType(dtype), std::move(shape),
                         Reason(reason), source(from));
           })
      .def("run",
           [](Encoder& e, unsigned threads, py::object progress, bool drop_cache) {
             Options o = options(threads, true, py::none(), std::move(progress));
             o.drop_cache = drop_cache;
             WithoutGil released;
             e.run(o);
           },
           py::arg("threads"), py::arg("progress") = py::none(), py::arg("drop_cache") = false)
      .def("verbatim",
           [](const Encoder& e) {
             std::vector<std::pair<uint32_t, uint32_t>> out;
             for (auto p : e.verbatim()) out.emplace_back(p.task, p.tensor);
             return out;
           })
      .def("append_verbatim",
           [](Encoder& e, uint32_t task, uint32_t tensor, bool zstd, const py::buffer& bytes,
              uint64_t raw_size) {
             py::buffer_info info = bytes.request();
             std::string_view view(static_cast<const char*>(info.ptr), info.size * info.itemsize);
             WithoutGil released;
             e.append_verbatim(task, tensor, zstd ? PlaneCoding::Zstd : PlaneCoding::Raw, view,
                               raw_size);
           })
      .def("copy_verbatim", &Encoder::copy_verbatim, py::call_guard<WithoutGil>())
      .def("append_file_plane",
           [](Encoder& e, bool zstd, std::string_view bytes, uint64_t raw_size) {
             WithoutGil released;
             return e.append_file_plane(zstd ? PlaneCoding::Zstd : PlaneCoding::Raw, bytes,
                                        raw_size);
           })
      .def("add_file", &Encoder::add_file)
      .def("add_metadata", &Encoder::add_metadata)
      .def("finish", &Encoder::finish, py::call_guard<WithoutGil>());

  m.def("compact", [](int from, int to, std::string label, std::string writer, unsigned threads,
                      py::object progress) {
    Options o = options(threads, true, py::none(), std::move(progress));
    WithoutGil released;
    return compact(from, to, std::move(label), std::move(writer), o);
  });

  py::class_<Loaded>(m, "Loaded").def("bytes", &Loaded::bytes);
  py::class_<DevicePlan>(m, "DevicePlan").def("tensors", device_tensors);
  py::class_<BufferFile>(m, "File")
      .def(py::init<std::string, const py::buffer&>())
      .def("identity", [](const BufferFile& f) { return f->identity(); })
      .def("size", [](const BufferFile& f) { return f->size(); })
      .def("memory", &BufferFile::memory)
      .def("header", header)
      .def("tasks", tasks)
      .def("tensors", tensors)
      .def("entries", entries)
      .def("planes", planes)
      .def("free", [](const BufferFile& f) {
        std::vector<std::pair<uint64_t, uint64_t>> out;
        for (const FreeRange& r : f.index().free) out.emplace_back(r.offset, r.size);
        return out;
      })
      .def("index_range", [](const BufferFile& f) {
        const Range r = f->index_range();
        return py::make_tuple(r.offset, r.size);
      })
      .def("sum",
           [](const BufferFile& f, uint32_t plane, uint64_t block) {
             if (plane >= f.index().planes.size()) throw py::index_error();
             const PlaneRecord& p = f.index().planes[plane];
             const uint64_t bytes = p.coding == PlaneCoding::External ? p.raw_size : p.size;
             if (block >= sum_count(bytes)) throw py::index_error();
             return f.index().sums[p.first_sum + block];
           })
      .def("files", files)
      .def("metadata", metadata)
      .def("find_task", [](const BufferFile& f, std::string_view name) { return f->find_task(name); })
      .def("find_tensor",
           [](const BufferFile& f, std::string_view name) { return f->find_tensor(name); })
      .def("original",
           [](const BufferFile& f, uint32_t tensor) { return f.index().original(tensor); })
      .def("name",
           [](const BufferFile& f, uint32_t tensor) {
             return string(f.index(), f.index().tensors[tensor].name);
           })
      .def("names",
           [](const BufferFile& f, uint32_t task) {
             py::list names;
             for (uint32_t i = 0; i < f.index().tensors.size(); ++i) {
               if (f->has(task, i)) names.append(string(f.index(), f.index().tensors[i].name));
             }
             return names;
           })
      .def("info",
           [](const BufferFile& f, uint32_t task, uint32_t tensor) {
             TensorInfo i = f->info(task, tensor);
             return py::make_tuple(int(i.dtype), shape(i.shape.data(), i.shape.size()), i.nbytes);
           })
      .def("ranges",
           [](const BufferFile& f, uint32_t task, uint32_t tensor) {
             std::vector<std::pair<uint64_t, uint64_t>> out;
             for (auto r : f->ranges(task, tensor)) out.emplace_back(r.offset, r.size);
             return out;
           })
      .def("require_known",
           [](const BufferFile& f, uint32_t task, uint32_t tensor) { f->require_known(task, tensor); })
      .def("needs_base", [](const BufferFile& f, uint32_t task,
                            uint32_t tensor) { return f->needs_base(task, tensor); })
      .def("decode", decode, py::arg("requests"), py::arg("threads"), py::arg("verify"),
           py::arg("inflate"), py::arg("loaded") = nullptr)
      .def("load", load)
      .def("device_plan", device_plan)
      .def("merge", merge, py::arg("requests"), py::arg("min_tasks"), py::arg("scale"),
           py::arg("threads"), py::arg("verify"), py::arg("progress") = py::none())
      .def("count_masks", count_masks, py::arg("tensors"), py::arg("threads"), py::arg("verify"),
           py::arg("progress") = py::none())
      .def("read_plane", read_plane)
      .def("verify", verify, py::arg("threads"), py::arg("progress") = py::none())
      .def("describe", [](const BufferFile& f, uint32_t plane) { return f->describe(plane); })
      .def("describe_all",
           [](const BufferFile& f, const std::vector<uint32_t>& planes) { return f->describe(planes); });
}
