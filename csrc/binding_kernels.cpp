// tallcodec._core.kernels: the kernels on NumPy arrays, for tests and benchmarks. 16-bit floats are
// arrays of any 16-bit type; element types are given by name.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "format.h"
#include "gil.h"
#include "kernels.h"
#include "parallel.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace py = pybind11;

namespace tallcodec {
namespace {

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::F32;
  if (name == "float16") return DType::F16;
  if (name == "bfloat16") return DType::BF16;
  if (name == "int8") return DType::I8;
  if (name == "signs") return kSigns;
  throw py::value_error("unknown element type '" + name + "'");
}

MaskRule rule_of(const std::string& name) {
  if (name == "published") return MaskRule::Published;
  if (name == "magnitude") return MaskRule::Magnitude;
  if (name == "adapted") return MaskRule::Adapted;
  throw py::value_error("unknown rule '" + name + "'");
}

const Kernels& kernels_of(const py::object& name) {
  const std::string forced = name.is_none() ? "" : name.cast<std::string>();
  const Kernels* const kernels = find_kernels(name.is_none() ? nullptr : forced.c_str());
  if (!kernels) throw py::value_error("kernels '" + forced + "' are not available");
  return *kernels;
}

// The memory of a contiguous array of `bytes` bytes.
uint8_t* memory(const py::array& array, uint64_t bytes) {
  if (!(array.flags() & py::array::c_style) || uint64_t(array.nbytes()) != bytes) {
    throw py::value_error("expected a contiguous array of " + std::to_string(bytes) + " bytes");
  }
  return static_cast<uint8_t*>(const_cast<void*>(array.data()));
}

uint8_t* writable(const py::array& array, uint64_t bytes) {
  if (!array.writeable()) throw py::value_error("the output array is read-only");
  return memory(array, bytes);
}

py::array bytes_array(uint64_t bytes) { return py::array_t<uint8_t>(py::ssize_t(bytes)); }

uint64_t units_of(uint64_t n) { return (n + kUnit - 1) / kUnit; }

template <typename Body>
void for_each_unit(uint64_t n, unsigned threads, Body body) {
  parallel_for(units_of(n), threads, nullptr, [&](uint64_t unit, unsigned) {
    body(unit, unit * kUnit, std::min(kUnit, n - unit * kUnit));
  });
}

struct UnitResult {
  std::vector<TaskStats> stats;
  std::vector<uint64_t> agreement;
  bool base_nonfinite = false;
};

void add(Sums& to, const Sums& sums) {
  for (uint32_t i = 0; i < kLanes; ++i) {
    to.tau_sq[i] += sums.tau_sq[i];
    to.dot[i] += sums.dot[i];
    to.approx_sq[i] += sums.approx_sq[i];
  }
}

py::dict dict_of(const Sums& sums) {
  py::dict d;
  d["tau_sq"] = py::array_t<double>(kLanes, sums.tau_sq);
  d["dot"] = py::array_t<double>(kLanes, sums.dot);
  d["approx_sq"] = py::array_t<double>(kLanes, sums.approx_sq);
  return d;
}

// Returns a dict of all outputs; pass an earlier one as `out` to have its arrays written again.
py::dict encode(const py::array& base, const std::vector<py::array>& tasks,
                const std::string& dtype, const std::vector<float>& thresholds,
                const std::string& shared_dtype, const py::object& kernels_name, unsigned threads,
                const py::object& out, const py::object& task_dtypes, const std::string& rule) {
  const Kernels& kernels = kernels_of(kernels_name);
  const DType base_dtype = dtype_of(dtype), shared_type = dtype_of(shared_dtype);
  const MaskRule mask_rule = rule_of(rule);
  const uint64_t n = uint64_t(base.size());
  const uint32_t count = uint32_t(tasks.size());
  if (thresholds.size() != count) throw py::value_error("expected one threshold per task");

  std::vector<DType> task_dtype(count, base_dtype);
  if (!task_dtypes.is_none()) {
    const auto names = task_dtypes.cast<std::vector<std::string>>();
    if (names.size() != count) throw py::value_error("expected one dtype per task");
    std::transform(names.begin(), names.end(), task_dtype.begin(), dtype_of);
  }

  py::dict result;
  if (out.is_none()) {
    py::list masks;
    for (uint32_t k = 0; k < count; ++k) masks.append(bytes_array((n + 7) / 8));
    result["shared"] = bytes_array(n * size_of(shared_type));
    result["scales"] = py::array_t<float>(
        shared_type == DType::I8 ? py::ssize_t((n + kScaleBlock - 1) / kScaleBlock) : 0);
    result["masks"] = masks;
  } else {
    result = out.cast<py::dict>();
  }

  const uint8_t* const base_memory = memory(base, n * size_of(base_dtype));
  uint8_t* const shared = writable(result["shared"].cast<py::array>(), n * size_of(shared_type));
  const py::array scales = result["scales"].cast<py::array>();
  float* const scale_memory =
      shared_type == DType::I8
          ? reinterpret_cast<float*>(writable(scales, (n + kScaleBlock - 1) / kScaleBlock * 4))
          : nullptr;
  const auto mask_arrays = result["masks"].cast<std::vector<py::array>>();
  if (mask_arrays.size() != count) throw py::value_error("expected one mask array per task");
  std::vector<const uint8_t*> task(count);
  std::vector<uint8_t*> mask(count);
  for (uint32_t k = 0; k < count; ++k) {
    task[k] = memory(tasks[k], n * size_of(task_dtype[k]));
    mask[k] = writable(mask_arrays[k], (n + 7) / 8);
  }

  std::vector<UnitResult> results(units_of(n));
  {
    WithoutGil released;
    for_each_unit(n, threads, [&](uint64_t unit, uint64_t first, uint64_t size) {
      UnitResult& r = results[unit];
      r.stats.resize(count);
      r.agreement.resize(count + 1);
      std::vector<const void*> task_here(count);
      std::vector<uint8_t*> mask_here(count);
      for (uint32_t k = 0; k < count; ++k) {
        task_here[k] = task[k] + first * size_of(task_dtype[k]);
        mask_here[k] = mask[k] + first / 8;
      }
      EncodeBlock e{};
      e.n = size;
      e.tasks = count;
      e.base = base_memory + first * size_of(base_dtype);
      e.base_dtype = base_dtype;
      e.task = task_here.data();
      e.task_dtype = task_dtype.data();
      e.rule = mask_rule;
      e.threshold = thresholds.data();
      e.shared = shared + first * size_of(shared_type);
      e.shared_dtype = shared_type;
      e.shared_scales = scale_memory ? scale_memory + first / kScaleBlock : nullptr;
      e.mask = mask_here.data();
      e.stats = r.stats.data();
      e.agreement = r.agreement.data();
      kernels.encode(e);
      r.base_nonfinite = e.base_nonfinite;
    });
  }

  UnitResult total;
  total.stats.resize(count);
  total.agreement.resize(count + 1);
  for (const UnitResult& r : results) {
    for (uint32_t k = 0; k < count; ++k) {
      add(total.stats[k].sums, r.stats[k].sums);
      total.stats[k].set_bits += r.stats[k].set_bits;
      total.stats[k].published_bits += r.stats[k].published_bits;
      total.stats[k].nonfinite |= r.stats[k].nonfinite;
    }
    for (uint32_t k = 0; k <= count; ++k) total.agreement[k] += r.agreement[k];
    total.base_nonfinite |= r.base_nonfinite;
  }
  py::list stats;
  for (const TaskStats& s : total.stats) {
    py::dict d = dict_of(s.sums);
    d["set_bits"] = s.set_bits;
    d["published_bits"] = s.published_bits;
    d["nonfinite"] = s.nonfinite;
    stats.append(d);
  }
  result["stats"] = stats;
  result["agreement"] = total.agreement;
  result["base_nonfinite"] = total.base_nonfinite;
  return result;
}

// The stored arrays of elements first .. first + n, where base has n; null pointers without a mask.
struct Stored {
  uint64_t n, phase;
  DType base_dtype, shared_dtype;
  const uint8_t *base, *shared = nullptr, *mask = nullptr;
  const float* scales = nullptr;

  Stored(const py::array& base_array, const py::object& shared_array, const py::object& mask_array,
         const std::string& dtype, const std::string& shared_name, const py::object& scale_array,
         uint32_t first)
      : n(uint64_t(base_array.size())), phase(first), base_dtype(dtype_of(dtype)),
        shared_dtype(dtype_of(shared_name)), base(memory(base_array, n * size_of(base_dtype))) {
    if (phase >= kScaleBlock) throw py::value_error("phase must be below 128");
    if (mask_array.is_none()) return;
    mask = memory(mask_array.cast<py::array>(), (phase + n + 7) / 8);
    shared = memory(shared_array.cast<py::array>(), shared_bytes(n));
    if (shared_dtype == DType::I8) {
      const uint64_t blocks = (phase + n + kScaleBlock - 1) / kScaleBlock;
      scales = reinterpret_cast<const float*>(memory(scale_array.cast<py::array>(), blocks * 4));
    }
  }

  // What so many elements take in the shared vector, or of signs, which begin where the mask does.
  uint64_t shared_bytes(uint64_t elements) const {
    return shared_dtype == kSigns ? (phase + elements + 7) / 8 : elements * size_of(shared_dtype);
  }

  // Elements i .. i + size, where i is a multiple of kScaleBlock.
  DecodeBlock block(uint64_t i, uint64_t size) const {
    DecodeBlock d{};
    d.n = size;
    d.phase = uint32_t(phase);
    d.base = base + i * size_of(base_dtype);
    d.base_dtype = base_dtype;
    d.shared_dtype = shared_dtype;
    if (!mask) return d;
    d.mask = mask + i / 8;
    d.shared = shared + shared_bytes(i);
    if (scales) d.shared_scales = scales + i / kScaleBlock;
    return d;
  }
};

py::array decode(const py::array& base, const py::object& shared, const py::object& mask,
                 const std::string& dtype, const std::string& shared_dtype,
                 const std::string& out_dtype, const py::object& scales, float gain, uint32_t phase,
                 const py::object& kernels_name, unsigned threads, const py::object& out) {
  const Kernels& kernels = kernels_of(kernels_name);
  const Stored stored(base, shared, mask, dtype, shared_dtype, scales, phase);
  const DType out_type = dtype_of(out_dtype);
  const uint64_t bytes = stored.n * size_of(out_type);
  py::array result = out.is_none() ? bytes_array(bytes) : out.cast<py::array>();
  uint8_t* const to = writable(result, bytes);
  WithoutGil released;
  for_each_unit(stored.n, threads, [&](uint64_t, uint64_t first, uint64_t size) {
    DecodeBlock d = stored.block(first, size);
    d.scale = gain;
    d.out = to + first * size_of(out_type);
    d.out_dtype = out_type;
    kernels.decode(d);
  });
  return result;
}

py::dict sums(const py::array& base, const py::object& shared, const py::object& mask,
              const py::array& task, const std::string& dtype, const std::string& shared_dtype,
              const std::string& task_dtype, const py::object& scales, uint32_t phase,
              const py::object& kernels_name) {
  const Kernels& kernels = kernels_of(kernels_name);
  const Stored stored(base, shared, mask, dtype, shared_dtype, scales, phase);
  const DType task_type = dtype_of(task_dtype);
  const uint8_t* const task_memory = memory(task, stored.n * size_of(task_type));
  Sums result{};
  kernels.sums(stored.block(0, stored.n), task_memory, task_type, result);
  return dict_of(result);
}

// `repeat` measures the hash itself on data that stays in cache.
uint64_t hash(const py::buffer& data, const py::object& kernels_name, unsigned repeat) {
  const Kernels& kernels = kernels_of(kernels_name);
  const py::buffer_info info = data.request();
  const size_t size = size_t(info.size * info.itemsize);
  WithoutGil released;
  uint64_t result = kernels.hash(info.ptr, size);
  while (repeat-- > 1) result = kernels.hash(info.ptr, size);
  return result;
}

// Packed masks of n elements each.
struct Masks {
  uint64_t n;
  std::vector<const uint8_t*> planes;

  Masks(const std::vector<py::array>& arrays, uint64_t n) : n(n) {
    for (const py::array& array : arrays) planes.push_back(memory(array, (n + 7) / 8));
  }

  // Runs body(block, unit) for every unit of the masks.
  template <typename Body>
  void for_each_block(unsigned threads, Body body) const {
    for_each_unit(n, threads, [&](uint64_t unit, uint64_t first, uint64_t size) {
      std::vector<const uint8_t*> here;
      for (const uint8_t* plane : planes) here.push_back(plane + first / 8);
      body(MaskBlock{size, uint32_t(here.size()), here.data()}, unit);
    });
  }

  // The sums of `size` numbers that `kernel` adds to.
  template <typename Kernel>
  std::vector<uint64_t> total(uint64_t size, unsigned threads, Kernel kernel) const {
    std::vector<std::vector<uint64_t>> parts(units_of(n), std::vector<uint64_t>(size));
    for_each_block(threads, [&](const MaskBlock& b, uint64_t unit) { kernel(b, parts[unit].data()); });
    std::vector<uint64_t> sums(size);
    for (const auto& part : parts) {
      for (uint64_t i = 0; i < size; ++i) sums[i] += part[i];
    }
    return sums;
  }
};

std::vector<uint64_t> agreement(const std::vector<py::array>& arrays, uint64_t n,
                                const py::object& kernels_name, unsigned threads) {
  const Kernels& kernels = kernels_of(kernels_name);
  const Masks masks(arrays, n);
  WithoutGil released;
  return masks.total(arrays.size() + 1, threads, kernels.agreement);
}

py::array consensus(const std::vector<py::array>& arrays, uint64_t n, uint32_t least,
                    const py::object& kernels_name) {
  if (least == 0) throw py::value_error("least must not be 0");
  const Kernels& kernels = kernels_of(kernels_name);
  const Masks masks(arrays, n);
  py::array result = bytes_array((n + 7) / 8);
  uint8_t* const out = writable(result, (n + 7) / 8);
  WithoutGil released;
  masks.for_each_block(1, [&](const MaskBlock& b, uint64_t unit) {
    kernels.consensus(b, least, out + unit * (kUnit / 8));
  });
  return result;
}

// pairs[x * masks + y] for x <= y.
std::vector<uint64_t> overlap(const std::vector<py::array>& arrays, uint64_t n,
                              const py::object& kernels_name) {
  const Kernels& kernels = kernels_of(kernels_name);
  const Masks masks(arrays, n);
  WithoutGil released;
  return masks.total(arrays.size() * arrays.size(), 1, kernels.overlap);
}

uint64_t zeros(const py::array& shared, const std::string& dtype, const py::object& scale_array,
               const py::object& kernels_name) {
  const Kernels& kernels = kernels_of(kernels_name);
  const DType type = dtype_of(dtype);
  const uint64_t n = uint64_t(shared.nbytes()) / size_of(type);
  const float* scales = nullptr;
  if (type == DType::I8) {
    const uint64_t blocks = (n + kScaleBlock - 1) / kScaleBlock;
    scales = reinterpret_cast<const float*>(memory(scale_array.cast<py::array>(), blocks * 4));
  }
  const uint8_t* const from = memory(shared, n * size_of(type));
  WithoutGil released;
  return kernels.zeros(from, type, scales, n);
}

// Reads every byte and does next to nothing with it: the yardstick of what only reads.
uint64_t read_all(const std::vector<py::array>& arrays, unsigned threads) {
  typedef uint64_t Part __attribute__((vector_size(16)));
  constexpr uint64_t step = 4 * sizeof(Part);
  std::atomic<uint64_t> result{0};
  std::vector<std::pair<const uint8_t*, uint64_t>> parts;
  for (const py::array& array : arrays) {
    parts.emplace_back(memory(array, uint64_t(array.nbytes())), array.nbytes());
  }
  WithoutGil released;
  for (const auto& [from, size] : parts) {
    for_each_unit(size * 8, threads, [&, from = from](uint64_t, uint64_t first, uint64_t bits) {
      Part sum[4] = {};
      const uint8_t* p = from + first / 8;
      const uint8_t* const end = p + bits / 8 / step * step;
      for (; p != end; p += step) {
        Part value[4];
        memcpy(value, p, step);
        for (int i = 0; i < 4; ++i) sum[i] ^= value[i];
      }
      const Part all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
      result ^= all[0] ^ all[1];
    });
  }
  return result;
}

// Stores past the cache, as a copy of more than the cache should; the ends are left to memcpy.
void stream(uint8_t* to, const uint8_t* from, size_t size) {
#if defined(__SSE2__)
  const size_t head = std::min(size, size_t(-reinterpret_cast<uintptr_t>(to) % 64));
  memcpy(to, from, head);
  size_t i = head;
  for (; size - i >= 64; i += 64) {
    for (size_t j = i; j < i + 64; j += 16) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), value);
    }
  }
  _mm_sfence();
  memcpy(to + i, from + i, size - i);
#else
  memcpy(to, from, size);
#endif
}

// The yardstick of the benchmarks.
void copy(const py::array& to, const py::array& from, unsigned threads) {
  const uint64_t bytes = uint64_t(from.nbytes());
  uint8_t* const target = writable(to, bytes);
  const uint8_t* const source = memory(from, bytes);
  WithoutGil released;
  for_each_unit(bytes / 4, threads, [&](uint64_t, uint64_t first, uint64_t size) {
    stream(target + first * 4, source + first * 4, size * 4);
  });
  memcpy(target + bytes / 4 * 4, source + bytes / 4 * 4, bytes % 4);
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Kernels* const* k = available_kernels(); *k; ++k) names.emplace_back((*k)->name);
  return names;
}

}  // namespace
}  // namespace tallcodec

void bind_kernels(py::module_& m) {
  using namespace tallcodec;
  using py::arg;
  py::module_ k = m.def_submodule("kernels", "The kernels on NumPy arrays, for tests.");
  k.def("available", &available, "Names of the variants this CPU runs, best first.");
  k.def("encode", &encode, arg("base"), arg("tasks"), arg("dtype"), arg("thresholds"),
        arg("shared_dtype"), py::kw_only(), arg("kernels") = py::none(), arg("threads") = 1,
        arg("out") = py::none(), arg("task_dtypes") = py::none(), arg("rule") = "published");
  k.def("decode", &decode, arg("base"), arg("shared"), arg("mask"), arg("dtype"),
        arg("shared_dtype"), arg("out_dtype"), py::kw_only(), arg("scales") = py::none(),
        arg("gain") = 1.0f, arg("phase") = 0, arg("kernels") = py::none(), arg("threads") = 1,
        arg("out") = py::none());
  k.def("sums", &sums, arg("base"), arg("shared"), arg("mask"), arg("task"), arg("dtype"),
        arg("shared_dtype"), arg("task_dtype"), py::kw_only(), arg("scales") = py::none(),
        arg("phase") = 0, arg("kernels") = py::none());
  k.def("hash", &hash, arg("data"), py::kw_only(), arg("kernels") = py::none(), arg("repeat") = 1);
  k.def("agreement", &agreement, arg("masks"), arg("n"), py::kw_only(),
        arg("kernels") = py::none(), arg("threads") = 1);
  k.def("consensus", &consensus, arg("masks"), arg("n"), arg("least"), py::kw_only(),
        arg("kernels") = py::none());
  k.def("overlap", &overlap, arg("masks"), arg("n"), py::kw_only(), arg("kernels") = py::none());
  k.def("zeros", &zeros, arg("shared"), arg("dtype"), py::kw_only(), arg("scales") = py::none(),
        arg("kernels") = py::none());
  k.def("read", &read_all, arg("arrays"), py::kw_only(), arg("threads") = 1);
  k.def("copy", &copy, arg("to"), arg("source"), py::kw_only(), arg("threads") = 1);
}
