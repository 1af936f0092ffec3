// Where the ranks' kernels meet: flags, letters, bounded waits, failure.
//
// [Note: blocks meet] Block b of a rank meets block b of every other rank, and nobody else; each
// block works on a part of its own and has staging slots of its own. A meeting is number e (the
// epoch, counted for each block in its segment, so that a captured kernel can be replayed): the
// block writes flag e into every peer's segment and waits until all peers have written theirs into
// its own.
//
// [Note: device staging] As [Note: staging] on the CPU: what is written before meeting e goes to
// slot e & 1, is read after it, and is overwritten only after meeting e + 1, where every reader has
// been. So one meeting a chunk is enough, and none trails.
//
// [Note: letters] At the first meeting of a call a block leaves a letter with each peer: what it
// calls. The flag carries a digest of it, so that equal calls are seen to be equal without reading
// letters. A peer may be one meeting ahead, and its flag another call's; then it has compared the
// digests itself.
//
// [Note: device failure] A wait that lasts too long, or a letter that differs, is written once into
// the status of this rank, for its host, and as one word ("poison") into the segments of all ranks.
// Whoever waits looks there now and then. A failed group stays failed: its kernels return at once,
// and the results are undefined.
#pragma once

#include "collectives/cuda/pack.hpp"
#include "transport/operations.hpp"

namespace primitives::cuda {

using Ranks = primitives_cuda_ranks;
using Call = primitives_cuda_call;
using Status = primitives_cuda_status;
constexpr int kMaxBlocks = PRIMITIVES_CUDA_MAX_BLOCKS;
constexpr uint64_t kNotSymmetric = PRIMITIVES_CUDA_NOT_SYMMETRIC;
constexpr uint32_t kPollsPerCheck = 64;

struct alignas(16) Letter {
  uint64_t call;          // op, dtype, reduce_op, has_counts, root, num_blocks
  uint64_t numel_nbytes;  // of the input; 0 with counts; fused: the digest of the cuts
  uint64_t factor;        // its bits
  uint64_t nbytes;        // from the writer to the reader; fused: the number of tensors
  uint64_t longest;       // of what the writer sends to anybody
  uint64_t place;         // in the writer's symmetric memory, of what the reader may read there;
                          // fused: 0, and the places are in the slot
};
static_assert(sizeof(Letter) == 8 * PRIMITIVES_CUDA_LETTER_WORDS);

// One block's part of a segment. flags and letters are written by the peers, each its own.
struct alignas(128) BlockLine {
  struct alignas(32) Flag {
    uint64_t value;  // digest << 32 | epoch
  };
  Flag flags[kMaxRanks];
  Letter letters[2][kMaxRanks];
  uint32_t epoch;  // the last meeting of this block
};

struct SegmentHead {
  alignas(128) uint64_t poison;
  alignas(128) uint32_t num_ended;  // blocks of this rank's kernel, see squares.hpp
  BlockLine lines[kMaxBlocks];
};

constexpr size_t segment_nbytes(uint32_t slot_nbytes) {
  return sizeof(SegmentHead) + size_t{2} * kMaxBlocks * slot_nbytes;
}

HOST_DEVICE_FN bool is_fused(Op op) {
  return op == Op::kAllGatherMany || op == Op::kReduceScatterMany;
}

HOST_DEVICE_FN uint64_t longest_part(const Ranks& ranks, const Call& call) {
  uint64_t longest = 0;
  for (int r = 0; r < ranks.world_size; r++) longest = larger(longest, call.in_nbytes[r]);
  return longest;
}

// What equal calls have in common.
DEVICE_FN uint64_t signature_of(const Call& call) {
  return uint64_t{call.op} | uint64_t{call.dtype} << 8 | uint64_t{call.reduce_op} << 16 |
         uint64_t{call.has_counts} << 24 | (static_cast<uint64_t>(call.root + 1) & 0xff) << 32 |
         static_cast<uint64_t>(call.num_blocks) << 40;
}

DEVICE_FN uint32_t digest_of(const Letter& letter) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, by words
  hash = (hash ^ letter.call) * 0x100000001b3;
  hash = (hash ^ letter.numel_nbytes) * 0x100000001b3;
  hash = (hash ^ letter.factor) * 0x100000001b3;
  return static_cast<uint32_t>(hash >> 32 ^ hash) | 1;  // 0: no first meeting
}

HOST_DEVICE_FN char* at_place(const Ranks& ranks, int rank, uint64_t place) {
  constexpr uint64_t kOffset = (uint64_t{1} << PRIMITIVES_CUDA_CHUNK_SHIFT) - 1;
  return ranks.chunks[rank][place >> PRIMITIVES_CUDA_CHUNK_SHIFT] + (place & kOffset);
}

template <class M>
class Meeting {
 public:
  DEVICE_FN Meeting(M& m, int block, const Ranks& ranks, const Call& call)
      : m_(m), block_(block), ranks_(ranks), call_(call) {
    epoch_ = m.load(&line(ranks.rank).epoch);
  }

  DEVICE_FN int rank() const { return ranks_.rank; }
  DEVICE_FN int world_size() const { return ranks_.world_size; }
  DEVICE_FN bool has_offered() const { return call_.place != kNotSymmetric; }

  // The slot of this block on `rank` that was published by the last meeting ...
  DEVICE_FN const char* slot(int rank) const { return slot_at(rank, epoch_); }
  // ... and the one on this rank that the next meeting will publish.
  DEVICE_FN char* next_slot() const { return slot_at(ranks_.rank, epoch_ + 1); }

  // The first meeting of the call. False: the group has failed, return.
  DEVICE_CALL bool begin() {
    first_epoch_ = epoch_ + 1;
    m_.sync();  // all that the lanes have staged is there
    m_.each_lane([&](int lane) {
      if (lane >= world_size() || lane == rank()) return;
      const Letter letter = letter_to(lane);
      store_letter(&line(lane).letters[(epoch_ + 1) & 1][rank()], letter);
      signal(lane, digest_of(letter));
    });
    return arrive([&](int peer, uint64_t found) {
      return compare(peer, found, digest_of(letter_to(peer))) && compare_counts(peer);
    });
  }

  DEVICE_CALL bool meet() {
    m_.sync();
    m_.each_lane([&](int lane) {
      if (lane < world_size() && lane != rank()) signal(lane, 0);
    });
    return arrive([&](int peer, uint64_t found) { return compare(peer, found, 0); });
  }

  // The end of the kernel.
  DEVICE_FN void end() {
    m_.each_lane([&](int lane) {
      if (lane == 0) m_.store(&line(rank()).epoch, epoch_);
    });
  }

  // Counts the blocks of this rank's kernel that are done with their work. True in all lanes of the
  // last one, which then sees what the others wrote.
  DEVICE_CALL bool is_last() {
    uint32_t* num_ended = &head(rank()).num_ended;
    m_.sync();
    return m_.all([&](int lane) {
      if (lane > 0) return true;
      const bool last = m_.count(num_ended) + 1 == static_cast<uint32_t>(call_.num_blocks);
      if (last) m_.store(num_ended, 0u);
      return last;
    });
  }

  // --- what the peers wrote, after begin(); `own` is this rank's
  DEVICE_FN uint64_t longest() const {
    uint64_t longest = longest_part(ranks_, call_);
    for (int r = 0; call_.has_counts && r < world_size(); r++) {
      if (r != rank()) longest = larger(longest, m_.load(&letter_from(r)->longest));
    }
    return longest;
  }
  // Ranks that have offered their inputs.
  DEVICE_FN int num_offers() const {
    int num = has_offered() ? 1 : 0;
    for (int r = 0; r < world_size(); r++) {
      if (r != rank() && m_.load(&letter_from(r)->place) != kNotSymmetric) num++;
    }
    return num;
  }
  // What a rank has offered to this one, of its input or all of it, as this rank sees it. (A letter
  // lasts two meetings.)
  DEVICE_FN char* offer(int r) const {
    const uint64_t place = r == rank() ? place_for(r) : m_.load(&letter_from(r)->place);
    return at_place(ranks_, r, place);
  }
  // For the host: this call went without staging.
  DEVICE_FN void count_direct() {
    m_.each_lane([&](int lane) {
      uint32_t* num_direct = &ranks_.status->num_direct;
      if (block_ == 0 && lane == 0) m_.store(num_direct, m_.load(num_direct) + 1);
    });
  }

 private:
  DEVICE_FN SegmentHead& head(int rank) const {
    return *reinterpret_cast<SegmentHead*>(ranks_.segments[rank]);
  }
  DEVICE_FN BlockLine& line(int rank) const { return head(rank).lines[block_]; }
  DEVICE_FN char* slot_at(int rank, uint32_t epoch) const {
    return ranks_.segments[rank] + sizeof(SegmentHead) +
           (size_t{2} * block_ + (epoch & 1)) * ranks_.slot_nbytes;
  }
  DEVICE_FN const Letter* letter_from(int rank) const {
    return &line(this->rank()).letters[first_epoch_ & 1][rank];
  }

  DEVICE_FN uint64_t place_for(int peer) const {
    const bool has_part = has_offered() && call_.in_nbytes[peer] > 0;
    return call_.place + (has_part ? call_.in[peer] - call_.in[0] : 0);
  }

  DEVICE_FN Letter letter_to(int peer) const {
    Letter letter;
    letter.call = signature_of(call_);
    const bool fused = is_fused(static_cast<Op>(call_.op));
    letter.numel_nbytes = fused ? call_.many.digest : call_.has_counts ? 0 : call_.in_nbytes[0];
    memcpy(&letter.factor, &call_.factor, 8);
    letter.nbytes = fused ? call_.many.num_tensors : call_.in_nbytes[peer];
    letter.longest = longest_part(ranks_, call_);
    letter.place = place_for(peer);
    return letter;
  }

  DEVICE_FN void store_letter(Letter* to, const Letter& letter) {
    Pack packs[sizeof(Letter) / kPackNbytes];
    memcpy(packs, &letter, sizeof letter);
    DEVICE_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(Letter)) / kPackNbytes; i++) {
      m_.store(reinterpret_cast<Pack*>(to) + i, packs[i]);
    }
  }

  DEVICE_FN void signal(int peer, uint32_t digest) {
    m_.release(&line(peer).flags[rank()].value, uint64_t{digest} << 32 | (epoch_ + 1));
  }

  // Lane r waits for rank r and then asks agrees(r, flag); the lane of this rank looks for poison.
  template <class Agrees>
  DEVICE_FN bool arrive(Agrees agrees) {
    epoch_++;
    return m_.all([&](int lane) {
      if (lane >= world_size()) return true;
      if (lane == rank()) return !is_poisoned();
      uint64_t found;
      return await(lane, &found) && agrees(lane, found);
    });
  }

  DEVICE_FN uint64_t flag(int peer) { return m_.acquire(&line(rank()).flags[peer].value); }
  DEVICE_FN bool has_come(uint64_t flag) const {
    return static_cast<int32_t>(static_cast<uint32_t>(flag) - epoch_) >= 0;
  }

  DEVICE_FN bool await(int peer, uint64_t* found) {
    uint64_t started = 0;
    for (uint32_t polls = 1;; polls++) {
      *found = flag(peer);
      if (has_come(*found)) return true;
      if (polls % kPollsPerCheck != 0) continue;
      if (is_poisoned()) return false;
      const uint64_t now = m_.now_ns();
      if (started == 0) started = now;
      const bool aborted = m_.acquire(&ranks_.status->abort) != 0;
      if (aborted || now - started >= ranks_.timeout_ns) {
        *found = flag(peer);  // this block may have been off the device since it looked
        return has_come(*found) ||
               fail(aborted ? PRIMITIVES_CUDA_ABORTED : PRIMITIVES_CUDA_TIMEOUT, peer);
      }
      m_.pause();
    }
  }

  DEVICE_FN bool compare(int peer, uint64_t found, uint32_t digest) {
    const bool ahead = static_cast<uint32_t>(found) != epoch_;
    return ahead || found >> 32 == digest || fail(PRIMITIVES_CUDA_MISMATCH, peer);
  }

  DEVICE_FN bool compare_counts(int peer) {
    return !call_.has_counts || m_.load(&letter_from(peer)->nbytes) == call_.out_nbytes[peer] ||
           fail(PRIMITIVES_CUDA_MISMATCH, peer);
  }

  // --- failure
  DEVICE_CALL bool is_poisoned() {
    const uint64_t poison = m_.acquire(&head(rank()).poison);
    if (poison == 0) return false;
    if (m_.claim(&ranks_.status->state)) {
      Status* status = ranks_.status;
      m_.store(&status->failure, uint32_t{PRIMITIVES_CUDA_TOLD});
      m_.store(&status->rank, static_cast<int32_t>(poison >> 8 & 0xff));
      m_.store(&status->missing, static_cast<uint32_t>(poison >> 16 & 0xff));
      m_.store(&status->op, static_cast<uint32_t>(poison >> 24 & 0xff));
      m_.store(&status->seq, static_cast<uint32_t>(poison >> 32));
      m_.release(&status->state, 2u);
    }
    return true;
  }

  DEVICE_CALL bool fail(primitives_cuda_failure failure, int peer) {
    uint32_t missing = 0;
    for (int r = 0; failure == PRIMITIVES_CUDA_TIMEOUT && r < world_size(); r++) {
      if (r != rank() && !has_come(flag(r))) missing |= 1u << r;
    }
    if (m_.claim(&ranks_.status->state)) {
      Status* status = ranks_.status;
      m_.store(&status->failure, static_cast<uint32_t>(failure));
      m_.store(&status->rank, ranks_.rank);
      m_.store(&status->missing, missing);
      m_.store(&status->peer, static_cast<int32_t>(peer));
      m_.store(&status->op, uint32_t{call_.op});
      m_.store(&status->seq, call_.seq);
      m_.store(&status->block, static_cast<uint32_t>(block_));
      m_.store(&status->epoch, epoch_);
      if (failure == PRIMITIVES_CUDA_MISMATCH) {
        const Letter letter = letter_to(peer);
        uint64_t mine[PRIMITIVES_CUDA_LETTER_WORDS];
        memcpy(mine, &letter, sizeof letter);
        const uint64_t* theirs = reinterpret_cast<const uint64_t*>(letter_from(peer));
        for (int i = 0; i < PRIMITIVES_CUDA_LETTER_WORDS; i++) {
          m_.store(&status->mine[i], mine[i]);
          m_.store(&status->theirs[i], m_.load(theirs + i));
        }
      }
      m_.release(&status->state, 2u);
    }
    const uint64_t poison = static_cast<uint64_t>(failure) | uint64_t(ranks_.rank) << 8 |
                            uint64_t{missing} << 16 | uint64_t{call_.op} << 24 |
                            uint64_t{call_.seq} << 32;
    for (int r = 0; r < world_size(); r++) m_.release(&head(r).poison, poison);
    return false;
  }

  M& m_;
  const int block_;
  const Ranks& ranks_;
  const Call& call_;
  uint32_t epoch_;
  uint32_t first_epoch_ = 0;  // of this call's first meeting
};

}  // namespace primitives::cuda
