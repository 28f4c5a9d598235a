// How many elements each tensor of a task keeps in its ternary plane: bits, or elements, go where they lower the
// error most. docs/format.md, "Encoding".
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace tallcodec {

// The magnitudes of a tensor's task vector between two bounds.
struct Bin {
  uint32_t number;
  uint64_t kept;  // elements in it and above
  double sum;     // of those in it
};

// What keeping the largest elements of a tensor costs, in bits, and what error it leaves.
struct Point {
  uint64_t kept;
  double bits, error;
};

// The lower convex hull of a tensor's points, from the fewest bits up: none where its task vector is 0. The bins
// are those that are not empty, from the largest magnitude down; tau_sq is the sum of all squares.
std::vector<Point> find_hull(uint64_t elements, double tau_sq, const std::vector<Bin>& bins);

struct Curve {
  uint64_t elements;
  const std::vector<Point>* hull;
};

struct Budget {
  double bits, density;  // per element; bits of 0: the density decides
  bool least = false;    // too few bits become the least there is
  double elements;       // of the whole task
};

// How many elements each tensor keeps. Throws Error(Status::Argument), whose message `task` begins, where the
// budget is less than one element of every tensor takes.
std::vector<uint64_t> allocate(const Budget& budget, const std::vector<Curve>& tensors, const std::string& task);

}  // namespace tallcodec
