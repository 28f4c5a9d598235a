// Makes the corpora that fuzzing, and the replay in `make test`, begin with: seeds GOLDEN OUTPUT
// OUTPUT/reader has the golden files, OUTPUT/planes every coded plane in them, as that target's inputs, and OUTPUT/planes and
// OUTPUT/kernels and OUTPUT/journal have choices at random, always the same.
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "format.h"
#include "planes.h"

using namespace tallcodec;
namespace fs = std::filesystem;

namespace {

using Bytes = std::vector<uint8_t>;

void write(const fs::path& path, const Bytes& bytes) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
}

template <class T>
void put(Bytes& to, T value) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  to.insert(to.end(), bytes, bytes + sizeof value);
}

// A coded plane of n elements, few, as planes.cpp takes it: the kind, how n is chosen, n, for a mask its length and, behind
// it, scales, the shared vector's type and values.
void write_planes(const fs::path& golden, const Bytes& bytes, const fs::path& to) {
  const File file(golden.string(), bytes.size(), [&](uint64_t offset, uint64_t) { return bytes.data() + offset; });
  const Index& index = file.index();
  for (uint32_t k = 0; k < index.tasks.size(); ++k) {
    for (uint32_t i = 0; i < index.tensors.size(); ++i) {
      const EntryRecord& e = index.entry(k, i);
      const TensorRecord& t = index.tensors[i];
      if (t.alias != kNone || (e.coding != Coding::Ternary && e.coding != Coding::Mask)) continue;
      const PlaneRecord& p = index.planes[e.plane];
      if (p.coding == PlaneCoding::Raw) continue;
      const auto append = [&](Bytes& out, uint32_t plane) {
        if (plane == kNone) return;
        const PlaneRecord& from = index.planes[plane];
        out.insert(out.end(), &bytes[from.offset], &bytes[from.offset] + from.size);
      };
      const bool is_mask = e.coding == Coding::Mask;
      const uint64_t n = index.elements(e.dims, e.rank);
      Bytes out{uint8_t(is_mask ? Kind::MaskBytes : Kind::TernaryBytes), 8};
      put(out, uint16_t(n - 1));
      if (is_mask) put(out, uint16_t(p.size));
      append(out, e.plane);
      if (is_mask) {
        append(out, t.shared_scales_plane);
        const DType* const dtype = std::find(kShared, kShared + 4, t.shared_dtype);
        out.push_back(uint8_t(dtype - kShared));
        out.push_back(1);  // values as they are
        append(out, t.shared_plane);
      }
      write(to / (golden.stem().string() + "-" + std::to_string(k) + "-" + std::to_string(i)), out);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const fs::path to = argv[2];
  for (const auto& entry : fs::directory_iterator(argv[1])) {
    if (entry.path().extension() != ".tall") continue;
    std::ifstream file(entry.path(), std::ios::binary);
    const Bytes bytes(std::istreambuf_iterator<char>(file), {});
    write(to / "reader" / entry.path().filename(), bytes);
    write_planes(entry.path(), bytes, to / "planes");
  }
  std::mt19937 random(1);
  for (const char* target : {"planes", "kernels", "journal"}) {
    for (uint32_t i = 0; i < 300; ++i) {
      Bytes bytes(16 + random() % 700);
      for (uint8_t& byte : bytes) byte = uint8_t(random());
      bytes[0] = uint8_t(i);  // each kind in turn
      write(to / target / ("random-" + std::to_string(i)), bytes);
    }
  }
  return 0;
}
