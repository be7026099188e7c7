// Instructions of Hopper (sm_90a): mbarriers, bulk and tensor (TMA) copies, warpgroup barriers.
#pragma once
#include <string>

#include "warp.h"
#ifdef __CUDACC__
#include <cuda.h>
#else
#include "../emulation/async.h"
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || \
    (!defined(__CUDACC__) && (!defined(QK_EMULATED_ARCH) || QK_EMULATED_ARCH == 900))
#define QK_HOPPER 1
#else
#define QK_HOPPER 0
#endif

namespace qk {

/// Whether this compilation is for such a GPU: plain sm_90 is none. The wrappers below stop kernels
/// that are compiled for others.
constexpr bool kOnHopper = QK_HOPPER;

QK_DEVICE uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
    return uint32_t(static_cast<const unsigned char*>(p) - shared_memory());
#endif
}

// ---------------------------------------------------------------- mbarriers
/// 8 bytes of shared memory that count arrivals, and bytes of copies; phases 0, 1, 0, ...
struct alignas(8) Barrier {
    uint64_t state;
};

QK_DEVICE void barrier_init(Barrier* b, uint32_t arrivals) {
#ifndef __CUDACC__
    emulation::mbarrier_init(b, arrivals);
#elif QK_HOPPER
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
                 : "memory");
#else
    not_for_this_gpu();
#endif
}
/// After the inits, before a block-wide barrier: makes the mbarriers visible to TMA.
QK_DEVICE void barrier_init_done() {
#if defined(__CUDACC__) && QK_HOPPER
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#elif defined(__CUDACC__)
    not_for_this_gpu();
#endif
}
QK_DEVICE void barrier_arrive(Barrier* b) {
#ifndef __CUDACC__
    emulation::mbarrier_arrive(b, 0);
#elif QK_HOPPER
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
#else
    not_for_this_gpu();
#endif
}
/// Arrives, and announces copies of `bytes`.
QK_DEVICE void barrier_arrive_expect(Barrier* b, uint32_t bytes) {
#ifndef __CUDACC__
    emulation::mbarrier_arrive(b, bytes);
#elif QK_HOPPER
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
                 "r"(bytes)
                 : "memory");
#else
    not_for_this_gpu();
#endif
}
/// Waits until the phase of this parity is over. Before the first phase, parity 1 counts as over.
QK_DEVICE void barrier_wait(Barrier* b, uint32_t parity) {
#ifndef __CUDACC__
    emulation::mbarrier_wait(b, parity);
#elif QK_HOPPER
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(b)), "r"(parity)
            : "memory");
    }
#else
    not_for_this_gpu();
#endif
}

/// Barrier of the 128 threads of a warpgroup. id: from 1, a different one for every warpgroup.
QK_DEVICE void sync_warpgroup(uint32_t id) {
#ifndef __CUDACC__
    (void)id;
    emulation::Machine::get().wait(emulation::Waits::warpgroup, "bar.sync of a warpgroup");
#else
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
#endif
}

/// setmaxnreg: sets the registers of each thread of this warpgroup to COUNT.
template <int COUNT>
QK_DEVICE void increase_registers() {
#if defined(__CUDACC__) && QK_HOPPER
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#elif defined(__CUDACC__)
    not_for_this_gpu();
#endif
}
template <int COUNT>
QK_DEVICE void decrease_registers() {
#if defined(__CUDACC__) && QK_HOPPER
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#elif defined(__CUDACC__)
    not_for_this_gpu();
#endif
}

// ---------------------------------------------------------------- copies
/// Copies `bytes`, a multiple of 16, from global to shared memory; `b` counts them.
QK_DEVICE void copy_bulk(void* to, const void* from, uint32_t bytes, Barrier* b) {
#ifndef __CUDACC__
    if (bytes % 16 != 0) {
        emulation::Machine::get().fail("bulk copy of %u bytes", bytes);
    }
    emulation::copy_bulk(to, from, bytes, bytes, b);
    emulation::copies_started();
#elif QK_HOPPER
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(b))
        : "memory");
#else
    not_for_this_gpu();
#endif
}

/// TMA descriptor of a matrix in global memory: boxes of rows x 128 bytes, swizzled.
struct TensorMap {
#ifdef __CUDACC__
    CUtensorMap map;  // at a multiple of 64
#else
    const unsigned char* base;
    int64_t width, rows, stride;  // bytes of a row, rows, bytes from row to row
    int box_rows, element;
    unsigned char unused[88];
#endif
};
static_assert(sizeof(TensorMap) == 128, "");

enum class Element { half, bfloat, byte };

/// Fills `map`. columns: elements of a row; stride: bytes from row to row, a multiple of 16.
/// Returns an error message, or "".
inline std::string encode_tensor_map(TensorMap& map, Element element, const void* base,
                                     int64_t columns, int64_t rows, int64_t stride, int box_rows) {
    const int size = element == Element::byte ? 1 : 2;
#ifndef __CUDACC__
    map = {
        static_cast<const unsigned char*>(base), columns * size, rows, stride, box_rows, size, {}};
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 16 == 0 && box_rows <= 256
               ? ""
               : "tensor map: address, stride or box that TMA does not take";
#else
    using Encode =
        CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode = nullptr;
    if (encode == nullptr) {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        if (error != cudaSuccess || function == nullptr) {
            return "the driver has no cuTensorMapEncodeTiled";
        }
        encode = reinterpret_cast<Encode>(function);
    }
    const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                         CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                         CU_TENSOR_MAP_DATA_TYPE_UINT8};
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)},
                     strides[] = {cuuint64_t(stride)};
    const cuuint32_t box[] = {cuuint32_t(128 / size), cuuint32_t(box_rows)}, steps[] = {1, 1};
    const CUresult result =
        encode(&map.map, types[int(element)], 2, const_cast<void*>(base), sizes, strides, box,
               steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? "" : "cuTensorMapEncodeTiled: error " + std::to_string(result);
#endif
}

/// TMA: copies the box at element `column` of `row` to shared memory at a multiple of 1024; zeros
/// outside of the matrix. `b` counts box_rows * 128 bytes.
QK_DEVICE void copy_box(void* to, const TensorMap& map, int column, int row, Barrier* b) {
#ifndef __CUDACC__
    emulation::check_aligned(to, 1024);
    for (int r = 0; r < map.box_rows; r++) {
        for (int unit = 0; unit < 8; unit++) {
            const int64_t at = int64_t(column) * map.element + unit * 16;
            const int64_t left = row + r < map.rows ? map.width - at : 0;
            const uint32_t live = left < 0 ? 0 : left < 16 ? uint32_t(left) : 16;
            unsigned char* plain = static_cast<unsigned char*>(to) + r * 128 + unit * 16;
            const unsigned char* from = map.base + (live ? (row + r) * map.stride + at : 0);
            emulation::copy_bulk(emulation::swizzled128(plain), from, 16, live, b);
        }
    }
    emulation::copies_started();
#elif QK_HOPPER
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(b)), "r"(column), "r"(row)
        : "memory");
#else
    not_for_this_gpu();
#endif
}
/// Prefetches a tensor map, which TMA will use.
QK_DEVICE void prefetch(const TensorMap& map) {
#if defined(__CUDACC__) && QK_HOPPER
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
    (void)map;
#endif
}

/// stmatrix, transposed: stores four 8x8 matrices from registers (as load_matrix has them) to
/// shared memory. Lane 8i + r points at row r of the transposed matrix i.
QK_DEVICE void store_matrix_transposed(void* row, const uint32_t (&in)[4]) {
#ifndef __CUDACC__
    struct Brought {
        uint32_t in[4];
    };
    emulation::check_aligned(row, 16);
    const auto met =
        emulation::Machine::get().meet("stmatrix", Brought{{in[0], in[1], in[2], in[3]}});
    const uint32_t i = lane_index() / 8, r = lane_index() % 8;
    emulation::note_shared_write(row, 16);
    for (uint32_t e = 0; e < 8; e++) {
        const uint32_t bits = met.lane(e * 4 + r / 2).in[i];
        static_cast<uint16_t*>(row)[e] = uint16_t(bits >> r % 2 * 16);
    }
#elif QK_HOPPER
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
                 : "memory");
#else
    not_for_this_gpu();
#endif
}

}  // namespace qk
