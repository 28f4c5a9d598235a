// Checkpoints to a `.tall` file: first what every tensor becomes, then its values.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "format.h"
#include "kernels.h"

namespace tallcodec {

struct Draft;

// How a file is made.
struct Recipe {
  Merge merge = Merge::TaskArithmetic;
  Method method = Method::Tall;
  double density = 0;  // Ties, Magnitude, Ternary: the share of every task vector that is kept
  ScaleMode scale = ScaleMode::None;
  BaseStorage storage = BaseStorage::Embedded;
  bool least_bits = false;  // Ternary: too few bits become the least there is, and no error
  bool code_masks = false;   // given the shared vector, where that is smaller; else they are raw
  bool code_ternary = true;  // else they are raw
  // The tasks are this many times the same ones with other thresholds: all of them, all of them again,
  // and so on. They are read, and merged, once.
  uint32_t trials = 1;
};

// Writes one file. Calls in this order: add_task and add_tensor, set_entry, run, append_*, finish.
// Throws Error; what was written to the file by then is to be thrown away.
class Encoder {
 public:
  // `fd` is an empty file, open for reading and writing; `label` names it in messages.
  Encoder(int fd, std::string label, std::string writer, const Recipe& recipe);
  ~Encoder();

  // Before run(): keeps a journal in a file that is open for reading and writing, and goes on with what the
  // journal of an encoder of the same `maker` has left, in it and in `fd`. The maker stands for everything
  // that is encoded, and how.
  void keep_journal(int fd, std::string label, std::string maker);

  // First of all: `fd` is no empty file but a complete one that is to be changed (extend.h), and that nobody else
  // changes meanwhile. Of its tasks these stay, its merge, scale and base storage too. Its tensors are there, and
  // those of the names `more`, which its base lacks, numbered in ascending order of all names; add_task adds tasks
  // behind, which are numbered from 0 on until all is done. A tensor gets no shared vector that it has not.
  void extend(std::vector<uint32_t> kept, const std::vector<std::string>& more, const std::vector<std::string>& untied);
  void set_base(uint32_t tensor, Source base);  // in place of the file's; needed where that has none
  void check_stored(const Options& options) const;
  void withdraw() const;  // takes back what was written, where nothing comes of it

  // What the masks and ternary planes of a task take and leave, after run().
  struct Cost {
    double bits = 0, elements = 0;  // elements: those coded so, and those in arithmetic that equal the base's
    double tau_sq = 0, error_sq = 0;  // at unit gain
  };
  Cost cost(uint32_t task) const;

  // A task is coded by the recipe's method or in ternary planes. `threshold` is lambda; of ternary
  // planes it is the bits per parameter, or 0: the recipe's density decides. The other methods find
  // what they store in its place.
  uint32_t add_task(std::string name, float threshold, bool ternary);
  // Tensors are added in ascending order of their names; every task's entry begins as absent.
  // A tensor that the base lacks has no dtype, no shape and no source.
  uint32_t add_tensor(std::string name, bool in_base, DType dtype, std::vector<uint64_t> shape,
                      DType shared_dtype, Source base, uint32_t alias);
  // `source` is read by run() for Coding::Mask and Coding::Ternary only.
  void set_entry(uint32_t task, uint32_t tensor, Coding coding, DType dtype,
                 std::vector<uint64_t> shape, Reason reason, Source source);

  // Places the planes, reads base and tasks once (and more often, where something must be known of their
  // values first: survey.h, adapt.h, sparsify.h), writes base, shared, mask and ternary planes. Tasks whose
  // tensor proves to hold NaN or infinity become verbatim; such a tensor alone is read again.
  void run(const Options& options);

  struct Pending {
    uint32_t task, tensor;
  };
  std::vector<Pending> verbatim() const;  // the entries whose plane is to be appended
  void append_verbatim(uint32_t task, uint32_t tensor, PlaneCoding coding, std::string_view bytes,
                       uint64_t raw_size);
  // The same of the entry's source, as it is.
  void copy_verbatim(uint32_t task, uint32_t tensor);
  uint32_t append_file_plane(PlaneCoding coding, std::string_view bytes, uint64_t raw_size);
  void add_file(uint32_t scope, std::string name, uint32_t plane);
  void add_metadata(uint32_t scope, std::string key, std::string value);

  uint64_t finish();  // writes the index and, last of all, the header; gives the file's size

 private:
  std::unique_ptr<Draft> draft_;
};

}  // namespace tallcodec
