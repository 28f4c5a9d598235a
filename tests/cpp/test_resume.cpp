// Encoding that is interrupted, between any two items and at every write, and goes on in another process: the
// same file comes out. So it does where what was left is damaged, or cut short, meanwhile.
#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "encode.h"
#include "kernels.h"

using namespace tallcodec;

namespace {

int writes_left = -1;  // until this process is killed, in the middle of a write; -1: it never is

}  // namespace

extern "C" ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  if (writes_left == 0) {
    ::syscall(SYS_pwrite64, fd, data, size / 2, offset);
    ::_exit(0);
  }
  if (writes_left > 0) --writes_left;
  return ::syscall(SYS_pwrite64, fd, data, size, offset);
}

namespace {

struct Interrupted {};

struct Case {
  const char* name;
  Recipe recipe;
  DType dtype = DType::F32, shared = DType::F32;
  bool ternary[3] = {false, false, false};
};

using Values = std::vector<float>;

struct Family {
  // One of more than a unit, which rows do not end at, and small ones; in some tasks one has an infinity.
  std::vector<std::vector<uint64_t>> shapes{{7, 30}, {701, 751}, {40}, {3, 5, 2}, {400, 30}};
  std::vector<Values> base;
  std::vector<std::vector<Values>> tasks;

  Family() {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (const auto& shape : shapes) {
      uint64_t n = 1;
      for (uint64_t d : shape) n *= d;
      base.emplace_back(n);
      for (float& x : base.back()) x = normal(random);
    }
    tasks.assign(3, base);
    for (auto& task : tasks) {
      for (auto& values : task) {
        for (float& x : values) x += 0.05f * normal(random);
      }
    }
    tasks[1][0][11] = HUGE_VALF;
    tasks[2][2] = base[2];
  }
};

const Family& family() {
  static const Family made;
  return made;
}

Source source(const Values& values) { return {reinterpret_cast<const uint8_t*>(values.data()), -1, 0}; }

// A temporary file that is gone with this.
class Temporary {
 public:
  Temporary() : file_(std::tmpfile()) {}
  ~Temporary() { std::fclose(file_); }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  int fd() const { return fileno(file_); }
  uint64_t size() const { return uint64_t(::lseek(fd(), 0, SEEK_END)); }
  std::string bytes() const {
    std::string all(size(), '\0');
    CHECK(::pread(fd(), all.data(), all.size(), 0) == ssize_t(all.size()));
    return all;
  }
  void flip(uint64_t at) const {
    char byte;
    CHECK(::pread(fd(), &byte, 1, off_t(at)) == 1);
    byte = char(byte ^ 0x40);
    CHECK(::syscall(SYS_pwrite64, fd(), &byte, 1, off_t(at)) == 1);
  }
  void shorten(uint64_t size) const { CHECK(::ftruncate(fd(), off_t(size)) == 0); }

 private:
  std::FILE* file_;
};

using Poll = std::function<void(const char*, uint64_t, uint64_t)>;

void encode(const Case& c, const Temporary& file, const Temporary* journal, unsigned threads, const Poll& poll = {}) {
  const Family& f = family();
  Encoder encoder(file.fd(), "test.tall", "test", c.recipe);
  if (journal) encoder.keep_journal(journal->fd(), "test.tall.partial", c.name);
  for (uint32_t k = 0; k < 3; ++k) encoder.add_task(std::string(1, char('a' + k)), c.ternary[k] ? 0.0f : 0.4f, c.ternary[k]);
  for (uint32_t i = 0; i < f.shapes.size(); ++i) {
    encoder.add_tensor(std::string(1, char('a' + i)), true, DType::F32, f.shapes[i], c.shared, source(f.base[i]), kNone);
    for (uint32_t k = 0; k < 3; ++k) {
      const bool same = f.tasks[k][i] == f.base[i];
      const Coding coding = same ? Coding::Base : c.ternary[k] ? Coding::Ternary : Coding::Mask;
      encoder.set_entry(k, i, coding, DType::F32, f.shapes[i], Reason::None, source(f.tasks[k][i]));
    }
  }
  Options options;
  options.threads = threads;
  options.poll = poll;
  encoder.run(options);
  for (auto [task, tensor] : encoder.verbatim()) encoder.copy_verbatim(task, tensor);
  encoder.add_metadata(kScopeFile, "who", "tests");
  encoder.finish();
}

// Ends in an exception at call number `at`, or not at all.
bool interrupted(const Case& c, const Temporary& file, const Temporary& journal, unsigned threads, int at) {
  int calls = 0;
  try {
    encode(c, file, &journal, threads, [&](const char*, uint64_t, uint64_t) {
      if (calls++ == at) throw Interrupted();
    });
  } catch (const Interrupted&) {
    return true;
  }
  return false;
}

// Gives how many items were encoded or coded again.
uint64_t go_on(const Case& c, const Temporary& file, const Temporary& journal, const std::string& expected,
               const char* after, int at) {
  std::map<std::string, uint64_t> items;
  encode(c, file, &journal, 2, [&](const char* step, uint64_t, uint64_t total) {
    if (std::strcmp(step, "verifying") != 0) items[step] = total;
  });
  check(file.bytes() == expected, "%s: another file after %s %d", c.name, after, at);
  uint64_t sum = 0;
  for (const auto& [step, total] : items) sum += total;
  return sum;
}

void test_every_item(const Case& c, const std::string& expected) {
  for (unsigned threads : {1u, 3u}) {
    for (int at = 0;; ++at) {
      Temporary file, journal;
      if (!interrupted(c, file, journal, threads, at)) break;
      go_on(c, file, journal, expected, "an interruption at", at);
    }
    Temporary file, journal;  // again and again, a little later each time
    int times = 0;
    while (interrupted(c, file, journal, threads, 2 + times / 4)) ++times;
    // Other threads may be done before this one is asked again.
    check((times > 3 || threads > 1) && file.bytes() == expected, "%s: another file after %d interruptions", c.name, times);
  }
}

// Runs what is killed at a write, and whether it was.
bool killed(const Case& c, const Temporary& file, const Temporary& journal, int at) {
  const pid_t child = ::fork();
  if (child == 0) {
    writes_left = at;
    encode(c, file, &journal, 1);
    ::_exit(1);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child && WIFEXITED(status));
  return WEXITSTATUS(status) == 0;
}

int test_every_write(const Case& c, const std::string& expected) {
  uint64_t left = UINT64_MAX;  // never more, the later it is
  int at = 0;
  for (;; ++at) {
    Temporary file, journal;
    if (!killed(c, file, journal, at)) break;
    const uint64_t again = go_on(c, file, journal, expected, "being killed at write", at);
    check(again <= left, "%s: %d items again when killed at write %d, before %d", c.name, int(again), at, int(left));
    left = again;
  }
  return at;
}

// What was lost once is not lost again: nothing is left of a journal that speaks of what is no more.
void test_kills_after_a_loss(const Case& c, const std::string& expected) {
  uint64_t left = UINT64_MAX;
  for (int at = 0;; at += 5) {
    Temporary file, journal;
    interrupted(c, file, journal, 1, INT_MAX);
    file.shorten(0);
    if (!killed(c, file, journal, at)) break;
    const uint64_t again = go_on(c, file, journal, expected, "a loss and being killed at write", at);
    check(again <= left, "%s: %d items again, %d writes after a loss, before %d", c.name, int(again), at, int(left));
    left = again;
  }
}

// Journals with right checksums that nobody wrote: refused, or the file comes out, or one that is no file.
int test_hostile(const Case& c) {
  std::mt19937_64 random(3);
  int refused = 0;
  for (int round = 0; round < 60; ++round) {
    Temporary file, journal;
    if (!killed(c, file, journal, 10 + int(random() % 50))) continue;
    std::string bytes = journal.bytes();
    std::vector<size_t> records;  // where they begin
    for (size_t at = bytes.find(c.name) + std::strlen(c.name); at + 16 <= bytes.size();) {
      uint64_t size;
      std::memcpy(&size, &bytes[at], sizeof size);
      if (size > bytes.size() - at - 16) break;
      records.push_back(at);
      at += 16 + size;
    }
    if (records.empty()) continue;
    const size_t at = records[random() % records.size()];
    uint64_t size;
    std::memcpy(&size, &bytes[at], sizeof size);
    for (int changes = 1 + int(random() % 3); changes--;) {
      const size_t where = at + 16 + random() % size;
      bytes[where] = char(random() % 3 ? bytes[where] ^ 1 << random() % 8 : 0xff);
    }
    Values padded((size + 63) / 64 * 16);
    std::memcpy(padded.data(), &bytes[at + 16], size);
    const uint64_t sum = find_kernels("scalar")->hash(reinterpret_cast<const uint8_t*>(padded.data()), padded.size() * 4);
    std::memcpy(&bytes[at + 8], &sum, sizeof sum);
    CHECK(::syscall(SYS_pwrite64, journal.fd(), bytes.data(), bytes.size(), off_t{0}) == ssize_t(bytes.size()));
    try {
      encode(c, file, &journal, 1);
    } catch (const Error&) {
      ++refused;
    }
  }
  return refused;
}

void test_damage(const Case& c, const std::string& expected) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 60; ++round) {
    Temporary file, journal;
    if (!killed(c, file, journal, 5 + int(random() % 60))) continue;
    if (!file.size() || journal.size() < 40) continue;
    switch (round % 4) {
      case 0: file.flip(random() % file.size()); break;
      case 1: journal.flip(40 + random() % (journal.size() - 40)); break;
      case 2: file.shorten(random() % file.size()); break;
      default: journal.shorten(40 + random() % (journal.size() - 40));
    }
    go_on(c, file, journal, expected, "damage in round", round);
  }
}

void test_another_maker(const Case& c) {
  Temporary file, journal;
  CHECK(interrupted(c, file, journal, 1, 3));
  const std::string before = file.bytes(), then = journal.bytes();
  Case other = c;
  other.name = "another";
  try {
    encode(other, file, &journal, 1);
    CHECK(false);
  } catch (const Error& e) {
    CHECK(e.status == Status::Argument);
  }
  CHECK(file.bytes() == before && journal.bytes() == then);
}

std::vector<Case> cases() {
  Recipe plain, rows, ties, adapted, coded, ternary, raw;
  rows.scale = ScaleMode::UnitGainRow;
  rows.storage = BaseStorage::Referenced;
  ties.merge = Merge::Ties;
  ties.density = 0.2;
  ties.code_masks = true;
  adapted.method = Method::Adapted;
  adapted.scale = ScaleMode::UnitGain;
  coded.code_masks = true;
  coded.scale = ScaleMode::UnitGainRow;
  ternary.density = raw.density = 0.1;
  raw.code_ternary = false;
  return {{"plain", plain},
          {"rows", rows, DType::F32, DType::I8},
          {"TIES", ties},
          {"adapted", adapted, DType::F32, DType::BF16},
          {"coded", coded, DType::F32, DType::I8},
          {"ternary", ternary, DType::F32, DType::F32, {true, true, true}},
          {"both", raw, DType::F32, DType::F32, {false, true, false}}};
}

}  // namespace

int main() {
  int writes = 0, refused = 0;
  for (const Case& c : cases()) {
    Temporary file;
    encode(c, file, nullptr, 1);
    const std::string expected = file.bytes();
    test_every_item(c, expected);
    writes += test_every_write(c, expected);
    test_kills_after_a_loss(c, expected);
    test_damage(c, expected);
    test_another_maker(c);
    refused += test_hostile(c);
  }
  CHECK(refused > 20);
  std::printf("resuming: %d passed, %d failed, killed at %d writes, %d journals refused\n", passed, failed, writes,
              refused);
  return failed != 0;
}
