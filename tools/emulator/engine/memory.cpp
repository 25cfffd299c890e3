#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <unordered_map>

namespace bnk {

namespace {

constexpr size_t alignment = 256;       // of device memory: cudaMalloc promises at least that
constexpr unsigned char poison = 0xff;  // NaN in every floating-point type, -1 in every integer
constexpr unsigned char sentinel = 0xa5;
#ifdef BNK_ASAN
constexpr size_t guard_bytes = 0;  // ASan has red zones of its own, provided that the block has the exact size
#else
constexpr size_t guard_bytes = alignment;
#endif

enum class Owner { heap, reserved, elsewhere };

struct Touched {  // 64 bytes of an array, one bit each
    uint64_t read = 0, written = 0;
};

struct Array {
    std::string name;
    size_t bytes;
    Owner owner;
    char* block;  // what to free
    bool read_only = false;
    Traffic traffic = {};
    std::unordered_map<size_t, Touched> touched = {};
};

std::map<uintptr_t, Array> arrays;  // by address
std::string error;

// The last array that starts at or before the address.
std::map<uintptr_t, Array>::iterator at_or_before(uintptr_t address) {
    const auto after = arrays.upper_bound(address);
    return after == arrays.begin() ? arrays.end() : std::prev(after);
}

// The array that holds these bytes, or null.
Array* holder(uintptr_t address, size_t bytes) {
    const auto found = at_or_before(address);
    if (found == arrays.end() || address + bytes > found->first + found->second.bytes) return nullptr;
    return &found->second;
}

// Names the neighbours: most strays are off by little.
std::string outside(uintptr_t address) {
    constexpr uintptr_t near = 4096;
    const auto before = at_or_before(address), after = arrays.upper_bound(address);
    std::string text = "outside every array";
    if (before != arrays.end()) {
        const uintptr_t end = before->first + before->second.bytes;
        if (address < end + near) text += ", " + std::to_string(address - end) + " bytes after " + before->second.name;
    }
    if (after != arrays.end() && after->first - address < near)
        text += ", " + std::to_string(after->first - address) + " bytes before " + after->second.name;
    return text;
}

// Marks bytes first .. first + bytes - 1 in a bitmap of 64 per word; returns how many were new.
template <uint64_t Touched::* kind>
uint64_t mark(Array& array, size_t first, size_t bytes) {
    uint64_t fresh = 0;
    while (bytes > 0) {
        const size_t offset = first % 64, count = bytes < 64 - offset ? bytes : 64 - offset;
        const uint64_t bits = (count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1) << offset;
        uint64_t& seen = array.touched[first / 64].*kind;
        fresh += __builtin_popcountll(bits & ~seen);
        seen |= bits;
        first += count;
        bytes -= count;
    }
    return fresh;
}

uintptr_t add(char* address, char* block, size_t bytes, Owner owner, const char* name) {
    arrays.insert_or_assign(reinterpret_cast<uintptr_t>(address), Array{name, bytes, owner, block});
    return reinterpret_cast<uintptr_t>(address);
}

}  // namespace

void memory::start_launch() {
    for (auto& [address, array] : arrays) {
        array.traffic = {address, array.bytes, 0, 0, 0, 0, 0, 0, 0};
        array.touched.clear();
    }
}

std::string memory::access(uintptr_t address, size_t bytes, bool is_write) {
    Array* const array = holder(address, bytes);
    if (!array) return outside(address);
    if (is_write && array->read_only) return "to " + array->name + ", which is read-only";
    Traffic& traffic = array->traffic;
    traffic.vector_accesses += bytes == 16;
    if (is_write) {
        ++traffic.writes;
        traffic.bytes_written += bytes;
        traffic.unique_bytes_written += mark<&Touched::written>(*array, address - traffic.address, bytes);
    } else {
        ++traffic.reads;
        traffic.bytes_read += bytes;
        traffic.unique_bytes_read += mark<&Touched::read>(*array, address - traffic.address, bytes);
    }
    return {};
}

}  // namespace bnk

// ---- for ../binding.py --------------------------------------------------------------------------------------------

using namespace bnk;

extern "C" {

// An array of the exact size, poisoned, `misalignment` bytes behind an aligned address. Null: no memory.
uintptr_t bnk_allocate(size_t bytes, size_t misalignment, const char* name) {
    const size_t before = guard_bytes + misalignment;
    void* block = nullptr;
    if (posix_memalign(&block, alignment, before + bytes + guard_bytes) != 0) return 0;
    memset(block, sentinel, before + bytes + guard_bytes);
    char* const address = static_cast<char*>(block) + before;
    memset(address, poison, bytes);
    return add(address, static_cast<char*>(block), bytes, Owner::heap, name);
}

// An array of zeros that takes memory only where it is touched. Null: the system refuses to promise that much.
uintptr_t bnk_reserve(size_t bytes, const char* name) {
    void* const block =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) return 0;
    return add(static_cast<char*>(block), static_cast<char*>(block), bytes, Owner::reserved, name);
}

// Memory of somebody else, to be known as an array until it is released.
void bnk_adopt(uintptr_t address, size_t bytes, const char* name) {
    add(reinterpret_cast<char*>(address), nullptr, bytes, Owner::elsewhere, name);
}

void bnk_release(uintptr_t address) {
    const auto found = arrays.find(address);
    if (found == arrays.end()) return;
    if (found->second.owner == Owner::heap) free(found->second.block);
    if (found->second.owner == Owner::reserved) munmap(found->second.block, found->second.bytes);
    arrays.erase(found);
}

// Makes a kernel's write an error, to the array that holds the address.
void bnk_set_read_only(uintptr_t address) {
    if (Array* const array = holder(address, 0)) array->read_only = true;
}

bool bnk_holds(uintptr_t address) { return holder(address, 0) != nullptr; }

// Names the first array whose surroundings were written to; null if all are whole.
const char* bnk_broken_guard() {
    for (const auto& [address, array] : arrays) {
        if (array.owner != Owner::heap) continue;
        const char* const end = reinterpret_cast<const char*>(address) + array.bytes;
        for (const char* p = array.block; p < end + guard_bytes; ++p) {
            if (p == reinterpret_cast<const char*>(address)) p = end;
            if (p < end + guard_bytes && static_cast<unsigned char>(*p) != sentinel) {
                error = p < end ? std::to_string(reinterpret_cast<const char*>(address) - p) + " bytes before "
                                : std::to_string(p - end) + " bytes after ";
                error += array.name;
                return error.c_str();
            }
        }
    }
    return nullptr;
}

// The traffic of the next array in memory at or after `address` that the last launch touched; false: no more.
bool bnk_traffic(uintptr_t address, Traffic* traffic) {
    for (auto next = arrays.lower_bound(address); next != arrays.end(); ++next)
        if (next->second.traffic.reads + next->second.traffic.writes > 0) {
            *traffic = next->second.traffic;
            return true;
        }
    return false;
}
}
