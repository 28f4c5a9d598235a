// tallcodec._core.gpu: the GPU's kernels on memory that Python has, given by address, and streams by their handle.
// Arguments are checked in Python, where the tensors are: tallcodec/kernels_cuda.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "gil.h"
#include "gpu.h"
#include "tallcodec.h"
#include "text.h"

namespace py = pybind11;

namespace tallcodec {
namespace {

using Address = uintptr_t;

std::vector<const GpuKernels*> tables() {
  std::vector<const GpuKernels*> all;
#ifdef TALLCODEC_HAS_CUDA
  all.push_back(&kernels_cuda);
#endif
  all.push_back(&kernels_cuda_host);
  return all;
}

// One table, and where it is to queue work.
class Queue {
 public:
  Queue(const std::string& name, int device, Address stream)
      : stream_{device, reinterpret_cast<void*>(stream)} {
    for (const GpuKernels* table : tables()) {
      if (name == table->name) kernels_ = table;
    }
    if (!kernels_) throw Error(Status::Argument, text("there are no kernels '", name, "' in this build"));
  }

  template <class Operation, class... Arguments>
  void operator()(Operation GpuKernels::* operation, const Arguments&... arguments) const {
    int error;
    {
      WithoutGil released;
      error = (kernels_->*operation)(stream_, arguments...);
    }
    if (error) {
      throw Error(Status::Device, text(kernels_->name, " device ", stream_.device, ": ", kernels_->error(error)));
    }
  }

 private:
  const GpuKernels* kernels_ = nullptr;
  GpuStream stream_;
};

template <class T>
T* at(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<Address>());
}

// n, phase, base, its type, shared, its type, scales, mask, scale, row scales, row length, out, its type
GpuBlock block_of(const py::tuple& t) {
  GpuBlock g{};
  g.block.n = t[0].cast<uint64_t>();
  g.block.phase = t[1].cast<uint32_t>();
  g.block.base = at<void>(t[2]);
  g.block.base_dtype = DType(t[3].cast<int>());
  g.block.shared = at<void>(t[4]);
  g.block.shared_dtype = DType(t[5].cast<int>());
  g.block.shared_scales = at<float>(t[6]);
  g.block.mask = at<uint8_t>(t[7]);
  g.block.scale = t[8].cast<float>();
  g.row_scales = at<float>(t[9]);
  g.row_length = t[10].cast<uint64_t>();
  g.block.out = at<void>(t[11]);
  g.block.out_dtype = DType(t[12].cast<int>());
  return g;
}

void decode(const Queue& queue, const py::list& tuples) {
  std::vector<GpuBlock> blocks;
  for (const py::handle& t : tuples) blocks.push_back(block_of(t.cast<py::tuple>()));
  const GpuBlock* const first = blocks.data();
  queue(&GpuKernels::decode, first, uint64_t{blocks.size()});
}

// Of values, mask, threshold and type of each.
std::vector<GpuTask> tasks_of(const py::list& tuples) {
  std::vector<GpuTask> tasks;
  for (const py::handle& item : tuples) {
    const auto t = item.cast<py::tuple>();
    tasks.push_back({at<void>(t[0]), at<uint8_t>(t[1]), t[2].cast<float>(), DType(t[3].cast<int>())});
  }
  return tasks;
}

// A table of tasks as 64-bit numbers, to be copied to the device.
std::vector<int64_t> task_table(const py::list& tuples) {
  const std::vector<GpuTask> tasks = tasks_of(tuples);
  static_assert(sizeof(GpuTask) % sizeof(int64_t) == 0);
  std::vector<int64_t> table(tasks.size() * sizeof(GpuTask) / sizeof(int64_t));
  if (!table.empty()) std::memcpy(table.data(), tasks.data(), tasks.size() * sizeof(GpuTask));
  return table;
}

void encode(const Queue& queue, uint64_t n, Address base, int base_dtype, int shared_dtype, int rule, bool aligned,
            const py::list& tasks, Address table, Address merged, Address shared, Address scales, Address set_bits,
            Address published_bits, Address agreement, Address nonfinite) {
  GpuEncode e{};
  e.n = n;
  e.base = reinterpret_cast<const void*>(base);
  e.base_dtype = DType(base_dtype);
  e.shared_dtype = DType(shared_dtype);
  e.rule = MaskRule(rule);
  e.aligned = aligned;
  const std::vector<GpuTask> all = tasks_of(tasks);
  e.tasks = uint32_t(all.size());
  std::copy_n(all.begin(), std::min<size_t>(all.size(), kGpuHeld), e.held);
  e.task = reinterpret_cast<const GpuTask*>(table);
  e.merged = reinterpret_cast<const float*>(merged);
  e.shared = reinterpret_cast<void*>(shared);
  e.shared_scales = reinterpret_cast<float*>(scales);
  e.set_bits = reinterpret_cast<int64_t*>(set_bits);
  e.published_bits = reinterpret_cast<int64_t*>(published_bits);
  e.agreement = reinterpret_cast<int64_t*>(agreement);
  e.nonfinite = reinterpret_cast<int32_t*>(nonfinite);
  queue(&GpuKernels::encode, e);
}

void sums(const Queue& queue, const py::tuple& block, Address task, int task_dtype, Address to) {
  queue(&GpuKernels::sums, block_of(block), reinterpret_cast<const void*>(task), DType(task_dtype),
        reinterpret_cast<double*>(to));
}

// `table`: the addresses of the masks, on the device.
GpuMasks masks_of(uint64_t n, uint32_t masks, Address table) {
  return {n, masks, reinterpret_cast<const uint8_t* const*>(table)};
}

GpuCoded coded_of(Address plane, uint64_t size, uint64_t n, Address status) {
  return {reinterpret_cast<const uint8_t*>(plane), size, n, reinterpret_cast<int32_t*>(status)};
}

}  // namespace
}  // namespace tallcodec

void bind_gpu(py::module_& m) {
  using namespace tallcodec;
  py::module_ g = m.def_submodule("gpu", "The GPU's kernels on addresses.");
  g.attr("HELD") = kGpuHeld;
  g.def("tables", [] {
    std::vector<std::string> names;
    for (const GpuKernels* table : tables()) names.emplace_back(table->name);
    return names;
  });
  g.def("devices", [](const std::string& name) -> std::pair<int, std::string> {
    for (const GpuKernels* table : tables()) {
      if (name != table->name) continue;
      const int found = table->devices();
      return {std::max(found, 0), found < 0 ? table->error(-found) : ""};
    }
    return {0, "built without CUDA"};
  });
  g.def("task_table", task_table);
  py::class_<Queue>(g, "Queue")
      .def(py::init<std::string, int, Address>())
      .def("decode", decode)
      .def("encode", encode)
      .def("sums", sums)
      .def("agreement",
           [](const Queue& queue, uint64_t n, uint32_t masks, Address table, Address counts) {
             queue(&GpuKernels::agreement, masks_of(n, masks, table), reinterpret_cast<int64_t*>(counts));
           })
      .def("overlap",
           [](const Queue& queue, uint64_t n, uint32_t masks, Address table, Address pairs) {
             queue(&GpuKernels::overlap, masks_of(n, masks, table), reinterpret_cast<int64_t*>(pairs));
           })
      .def("consensus",
           [](const Queue& queue, uint64_t n, uint32_t masks, Address table, uint32_t least, Address out) {
             queue(&GpuKernels::consensus, masks_of(n, masks, table), least, reinterpret_cast<uint8_t*>(out));
           })
      .def("unpack_ternary",
           [](const Queue& queue, Address plane, uint64_t size, uint64_t n, Address status, uint64_t head,
              Address slots, Address mask, Address signs) {
             queue(&GpuKernels::unpack_ternary,
                   GpuTernary{coded_of(plane, size, n, status), head, reinterpret_cast<const uint64_t*>(slots),
                              reinterpret_cast<uint8_t*>(mask), reinterpret_cast<uint8_t*>(signs)});
           })
      .def("unpack_mask",
           [](const Queue& queue, Address plane, uint64_t size, uint64_t n, Address status, Address shared,
              int shared_dtype, Address scales, Address mask) {
             queue(&GpuKernels::unpack_mask,
                   GpuConditional{coded_of(plane, size, n, status), reinterpret_cast<const void*>(shared),
                                  DType(shared_dtype), reinterpret_cast<const float*>(scales),
                                  reinterpret_cast<uint8_t*>(mask)});
           });
}
