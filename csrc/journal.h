// What of a file in the making is done, kept beside it: so that another process can go on with it.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "format.h"
#include "tallcodec.h"

namespace tallcodec {

struct Draft;

// A journal is a file of records that are added when a step is done. Each says what has become of planes, tensors
// and entries by then; of two that speak of the same, the later one holds.
class Journal {
 public:
  // `number` is that of a tensor, plane or task.
  enum class Step : uint32_t {
    Surveyed = 1,  // what is known of all values before they are coded
    Encoded,       // a tensor
    Waiting,       // a coded mask plane, complete, behind all planes
    Placed,        // the same where it belongs
    Packed,        // all masks
    Sparsified,    // a task's ternary planes
  };

  // What is written down of a draft.
  struct Changes {
    std::vector<uint32_t> planes, tensors;                // tensors: with the entries of all tasks
    std::vector<std::pair<uint32_t, uint32_t>> entries;  // (task, tensor)
    std::string note;                                    // whatever else there is to know
  };

  Journal() = default;  // none is kept
  // `fd` is open for reading and writing. A journal of another `maker` is an Error(Status::Argument): the maker
  // stands for everything that the file will depend on.
  Journal(int fd, std::string label, std::string maker) : fd_(fd), label_(std::move(label)), maker_(std::move(maker)) {}
  Journal& operator=(Journal&& other);

  // Gives the draft what the journal says is done, as far as the file still has it: all planes are checked.
  // What is not done, or damaged, is not in the file afterwards.
  void restore(Draft& draft, const Options& options);

  bool has(Step step, uint32_t number = 0) const { return done_.count({step, number}); }
  const std::string& note(Step step) const { return done_.at({step, 0}); }
  // Several threads may call it at once.
  void add(Step step, uint32_t number, const Draft& draft, const Changes& changes);

 private:
  struct Record;

  std::vector<Record> read();
  void shorten() const;  // to its whole records
  // Whether a draft can have become what a record says.
  static bool fits(const Record& record, const Draft& d);

  int fd_ = -1;
  std::string label_, maker_;
  uint64_t size_ = 0;  // bytes of whole records
  std::map<std::pair<Step, uint32_t>, std::string> done_;
  std::mutex mutex_;
};

}  // namespace tallcodec
