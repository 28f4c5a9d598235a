// A file with an entry of every coding, for the tests of those that read it.
#pragma once
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "encode.h"
#include "format.h"
#include "kernels.h"

namespace tallcodec {
namespace {

using Bytes = std::vector<uint8_t>;

// Somewhat normal, and the same numbers on every machine, as std::normal_distribution's need not be.
float normal(std::mt19937& random) {
  int sum = 0;
  for (int i = 0; i < 4; ++i) sum += int(random() >> 16) - 32768;
  return float(sum) / 37000;
}

template <class T>
Source source(const std::vector<T>& values) {
  return {reinterpret_cast<const uint8_t*>(values.data()), -1, 0};
}

// A base and two tasks with an entry of every coding, encoded into a temporary file and read back.
Bytes encode(const Kernels* kernels, Recipe recipe, DType shared,
             const std::vector<float>& base) {
  std::mt19937 random(1);
  std::vector<std::vector<float>> tasks(2, base);
  for (auto& task : tasks) {
    for (float& x : task) x += 0.01f * normal(random);
  }
  std::vector<float> broken = tasks[1];
  broken[3] = HUGE_VALF;
  const std::vector<int64_t> steps{16777217, 2, 3};
  const std::vector<uint64_t> shape{6, base.size() / 6}, three{3};

  std::FILE* temporary = std::tmpfile();
  const int fd = fileno(temporary);
  recipe.density = 0.3;
  Encoder encoder(fd, "test.tall", "test", recipe);
  encoder.add_task("a", 0.4f, false);
  encoder.add_task("b", 0.5f, false);
  encoder.add_task("c", 0, true);
  auto tensor = [&](const char* name, bool in_base, uint32_t alias = kNone) {
    return encoder.add_tensor(name, in_base, in_base ? DType::F32 : DType{},
                              in_base ? shape : std::vector<uint64_t>{}, shared,
                              in_base ? source(base) : Source{}, alias);
  };
  uint32_t head = tensor("head", false), nan = tensor("nan", true), same = tensor("same", true);
  uint32_t weight = tensor("weight", true);
  tensor("weight.tied", true, weight);
  for (uint32_t k = 0; k < 3; ++k) {
    const Coding coding = k == 2 ? Coding::Ternary : Coding::Mask;
    encoder.set_entry(k, weight, coding, DType::F32, shape, Reason::None, source(tasks[k % 2]));
    encoder.set_entry(k, same, Coding::Base, DType::F32, shape, Reason::None, {});
    encoder.set_entry(k, nan, coding, DType::F32, shape, Reason::None,
                      source(k ? broken : tasks[0]));
  }
  encoder.set_entry(0, head, Coding::Verbatim, DType::I64, three, Reason::NotInBase, {});
  Options options;
  options.threads = 2;
  options.kernels = kernels;
  encoder.run(options);
  for (auto pending : encoder.verbatim()) {
    auto bytes = [](const auto& v) {
      return std::string_view(reinterpret_cast<const char*>(v.data()), v.size() * sizeof v[0]);
    };
    std::string_view plane = pending.tensor == head ? bytes(steps) : bytes(broken);
    encoder.append_verbatim(pending.task, pending.tensor, PlaneCoding::Raw, plane, plane.size());
  }
  encoder.add_file(1, "config.json", encoder.append_file_plane(PlaneCoding::Raw, "{}", 2));
  encoder.add_metadata(kScopeFile, "who", "tests");
  Bytes file(encoder.finish());
  if (::pread(fd, file.data(), file.size(), 0) != static_cast<ssize_t>(file.size())) {
    throw Error(Status::Read, "test.tall cannot be read");
  }
  std::fclose(temporary);
  return file;
}

std::vector<float> random_base(size_t n) {
  std::vector<float> base(n);
  std::mt19937 random(0);
  for (float& x : base) x = normal(random);
  return base;
}

}  // namespace
}  // namespace tallcodec
