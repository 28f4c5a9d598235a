// Messages: text("tensor '", name, "' has ", n, " elements").
#pragma once
#include <sstream>
#include <string>

namespace tallcodec {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace tallcodec
