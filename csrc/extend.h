// A file that is changed where it is: tasks go, others come. What it holds stays as it is, for whoever reads it
// meanwhile; what is new goes behind it, and one write, of a slot of the header, makes the difference.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "format.h"

namespace tallcodec {

struct Draft;
struct DraftTensor;

// The file that is changed, as it was.
struct Original {
  Header header;
  Slot slot;  // the current one
  Index index;
  std::vector<uint32_t> kept;  // the tasks that stay
  bool committing = false;     // the other slot may have been written
};

// Gives an empty draft, over such a file, its planes and tensors, and tensors of further names, which the base
// lacks. Those named in `untied`, aliases in the file, get records of their own. The tasks are the draft's new ones
// alone, until join(). Throws Error(Status::Version) where there is something in the file that is not known here.
void adopt(Draft& draft, std::vector<uint32_t> kept, const std::vector<std::string>& more,
           const std::vector<std::string>& untied);

// Checks the base, wherever its values come from, and the shared vectors against the file's checksums.
void check_stored(const Draft& draft, const Options& options);

// Elements first .. first + n of a tensor's shared vector in the file; what is not finite is 0. `first` begins an
// int8 scale's block.
void read_shared(const Draft& draft, const DraftTensor& tensor, uint64_t first, uint64_t n, float* s);

// Puts the tasks that stay before the new ones, and drops what nobody uses any more.
void join(Draft& draft);

// The free ranges of the changed file, ascending: those it had, its index, and `more`.
std::vector<FreeRange> free_ranges(const Draft& draft, std::vector<FreeRange> more);

// Writes the index behind the planes, and then the slot of the header that names it. Gives the file's size.
uint64_t commit(Draft& draft, std::string_view index);

// Takes back what was written of a change that was not to be, unless it may have been committed.
void withdraw(const Draft& draft);

// Writes a file, open for reading, without its free ranges into another one, which is empty. Gives its size.
uint64_t compact(int from, int to, std::string label, std::string writer, const Options& options);

}  // namespace tallcodec
