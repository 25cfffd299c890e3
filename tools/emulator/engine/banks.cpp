#include "banks.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "scheduler.h"

namespace bnk::banks {

namespace {

constexpr size_t bank_count = 32, bank_bytes = 4, turn_bytes = bank_count * bank_bytes;

struct Piece {  // what one lane asks for
    unsigned lane;
    size_t offset, bytes;
};

using Place = std::tuple<uint64_t, unsigned, const void*>;  // block, thread or warp, instruction
std::map<Place, unsigned> executions;                       // by thread
std::map<std::pair<Place, unsigned>, std::vector<Piece>> accesses;

// The hardware serves so many neighbouring lanes together that they fill a turn: 32 with 4 bytes, 16 with 8, 8 with 16.
// Within those, a bank gives one word a turn, to all lanes that want it.
Turns turns_of(const std::vector<Piece>& pieces) {
    Turns found = {};
    const size_t lanes = turn_bytes / std::max(pieces.front().bytes, bank_bytes);
    for (size_t first = 0; first < bank_count; first += lanes) {
        std::array<std::set<size_t>, bank_count> words;
        for (const Piece& piece : pieces)
            if (piece.lane / lanes == first / lanes)
                for (size_t word = piece.offset / bank_bytes; word * bank_bytes < piece.offset + piece.bytes; ++word)
                    words[word % bank_count].insert(word);
        size_t most = 0;
        for (const auto& of_bank : words) most = std::max(most, of_bank.size());
        found.taken += most;
        found.fewest += most > 0;
    }
    return found;
}

}  // namespace

void start_launch() {
    executions.clear();
    accesses.clear();
}

void note(size_t offset, size_t bytes, const void* instruction) {
    const Thread& thread = *running.thread;
    const uint64_t number = block_number(*thread.block);
    const unsigned execution = executions[{number, thread.number, instruction}]++;
    accesses[{{number, thread.number / 32, instruction}, execution}].push_back({thread.lane, offset, bytes});
}

Turns turns() {
    Turns all = {};
    for (const auto& [place, pieces] : accesses) {
        const Turns found = turns_of(pieces);
        all.taken += found.taken;
        all.fewest += found.fewest;
    }
    return all;
}

}  // namespace bnk::banks
