"""Mutations of the Triton kernels, their layouts and launchers."""

from __future__ import annotations

KERNEL, DECODERS, SCALERS = (
    f"triton_kernels/{f}.py" for f in ("weight_only", "decoders", "scalers")
)
LAYOUT, LAUNCH = "qkernels/layouts/weight_only.py", "qkernels/backends/triton/weight_only.py"
CODECS = "qkernels/layouts/codecs.py"
GEMM8, ACTIVATIONS = "triton_kernels/eight_bit.py", "triton_kernels/activations.py"
BLOCKS = "triton_kernels/blocks.py"
LAYOUT8, LAUNCH8 = "qkernels/layouts/eight_bit.py", "qkernels/backends/triton/eight_bit.py"
PLAN = "qkernels/backends/plan.py"
KRONECKER, TRANSFORMS = "triton_kernels/kronecker.py", "qkernels/backends/triton/transforms.py"
EXPERTS_KERNEL, EXPERTS_LAUNCH = "triton_kernels/experts.py", "qkernels/backends/triton/experts.py"
SCALING = "triton_kernels/scalers.py"
CONFIGS = "qkernels/backends/triton/configs.py"

WEIGHT_ONLY = [
    (DECODERS, "0x64006400 if DTYPE", "0x64016400 if DTYPE"),
    (DECODERS, "else 0x43004300", "else 0x43004301"),
    (DECODERS, "(_shifts(high, 2) & 0x10001) << 2", "(_shifts(high, 2) & 0x10001) << 1"),
    (DECODERS, "join(word >> 8, word >> 12)", "join(word >> 12, word >> 8)"),
    (DECODERS, "- (zero + OFFSET)", "- OFFSET"),
    (DECODERS, "tl.load(at + 4 + code // 4)", "tl.load(at + code // 4)"),
    (DECODERS, "prmt.b32 $3, lo, hi, 0x7362", "prmt.b32 $3, lo, hi, 0x5140"),
    (DECODERS, "or.b32 bit3, bit3, 0x32103210", "or.b32 bit3, bit3, 0x32103211"),
    (DECODERS, "256.0 if DTYPE", "128.0 if DTYPE"),
    (DECODERS, "(pair & 0x007F007F) << 5", "(pair & 0x007F007F) << 4"),
    (SCALERS, "g = kk // GROUP", "g = kk // GROUP + 1"),
    (SCALERS, "tl.load(group_ptr + kk // 16)", "tl.load(group_ptr + kk // 32)"),
    (SCALERS, "rows[:, None] // ROW_GROUP", "rows[:, None] % ROW_GROUP"),
    (SCALERS, "tl.cdiv(N, ROW_GROUP)", "N // ROW_GROUP"),
    (SCALERS, "block // 256", "block // 128"),
    (SCALERS, "inner + tl.load(offset_ptr)", "inner"),
    (SCALERS, "code << 7, 0x0040", "code << 6, 0x0040"),
    (SCALERS, "return s, s * (z_s", "return s, (z_s"),
    (CODECS, '("scales_l", "d", "scales_h"), "none"', '("scales_h", "d", "scales_l"), "none"'),
    (CODECS, '("d", "m"), "min", "scale_min"', '("d", "m"), "none", "scale_min"'),
    (CODECS, '"linear", "unsigned", "Unsigned<T, 3>"', '"linear", "signed", "Unsigned<T, 3>"'),
    (SCALERS, "rows.to(tl.int64)[:, None] * K", "rows.to(tl.int64)[:, None] * KP if False else rows[:, None]"),
    (KERNEL, "permute(0, 5, 4, 2, 3, 1, 6)", "permute(0, 5, 4, 2, 1, 3, 6)"),
    (KERNEL, "permute(0, 2, 1, 3, 4)", "permute(0, 1, 2, 3, 4)"),
    (KERNEL, "live = kk < K", "live = kk < K - 1"),
    (KERNEL, "live = k >= 0", "live = k >= 1"),
    (KERNEL, "mask=kk < KP, other=-1", "mask=kk < KP - 1, other=-1"),
    (KERNEL, "kk = first + part * SCALE_GROUP", "kk = first"),
    (KERNEL, "kk = first + tl.arange(0, TILE)", "kk = tl.arange(0, TILE)"),
    (KERNEL, "begin = tl.program_id(1) * slice_tiles", "begin = 0"),
    (BLOCKS, "for s in range(SPLIT_K):", "for s in range(SPLIT_K - 1):"),
    (BLOCKS, "tl.store(counter_ptr + pid, 0)", "tl.store(counter_ptr + pid, 1)"),
    (BLOCKS, "group_n = tl.minimum(blocks_n - first_n, GROUP_N)", "group_n = GROUP_N"),
    (KERNEL, "total += tl.load(bias_ptr + rows", "total += 0 * tl.load(bias_ptr + rows"),
    (KERNEL, "mask=(rows < N)[:, None] & (columns < M)", "mask=(rows < N - 1)[:, None] & (columns < M)"),
    (KERNEL, "mask=live[:, None] & mask, other=0)", "mask=live[:, None] & (mask == 0), other=0)"),
    (KERNEL, "[:, None] == group[None, :]", "[:, None] <= group[None, :]"),
    (KERNEL, "first + tl.arange(0, SCALE_GROUPS) * SCALE_GROUP", "first + tl.arange(0, SCALE_GROUPS) * 0"),
    (KERNEL, "groups = (tile + 1) * TILE", "groups = tile * TILE"),
    (KERNEL, "operand = TRAITS.finish(operand, zeros[part]", "operand = TRAITS.finish(operand, zeros[0]"),
    (KERNEL, "acc += scales[part]", "acc += scales[0]"),
    (KERNEL, "% (BLOCK_M // SCALE_GROUPS)", "% BLOCK_M"),
    (KERNEL, "part -= zero * total", "part -= zero * 0"),
    (KERNEL, "acc -= zero * total", "acc -= zero * 0"),
    (KERNEL, "tl.where(tl.arange(0, BLOCK_M) < BLOCK_M // SCALE_GROUPS, m, M)", "m"),
    (KERNEL, "x = x + (_outlier_x(x_rows, outliers[i], x_column, live),)", "x = x + (_outlier_x(x_rows, outliers[0], x_column, live),)"),
    (KERNEL, "K_SLICES * AT_ONCE)", "K_SLICES * AT_ONCE + 1)"),
    (DECODERS, "^ 0x43804380", "^ 0x43004300"),
    ("triton_kernels/gather.py", "mask=k >= 0", "mask=k >= 1"),
    (CODECS, "(s // 2) * 16 + (s % 2) * 8 + b * 4", "(s // 2) * 16 + (s % 2) * 4 + b * 8"),
    (LAYOUT, "padded = -(-count // SLICE) * SLICE", "padded = count // SLICE * SLICE"),
    (LAYOUT, "math.gcd(tile, traits.group_size)", "tile"),
    (LAUNCH, 'weight["K"] = x.shape[1]', 'pass'),
    (LAUNCH, "problem.m * groups <= config.block_m", "problem.m <= config.block_m"),
]  # fmt: skip

PLANS = [
    (PLAN, "offset=self.offset + first * row", "offset=self.offset"),
    (PLAN, "n + -(-s // _ALIGNMENT) * _ALIGNMENT", "n + s"),
    (PLAN, "self._most = _Sizes(*map(max, self._most, self._now))", "self._most = self._now"),
    (PLAN, "self._counters = max(self._counters, count)", "self._counters = 0"),
    (PLAN, "(address & 15) << 4 * i", "0"),
    (PLAN, "del self.steps[steps:]", "pass"),
    (PLAN, "fixed += excess", "break"),
    (PLAN, "offset - (self.operands[base - OPERANDS].low", "offset - (0"),
    ("qkernels/backends/triton/launch.py", "bases[base] + offset", "bases[base]"),
    ("qkernels/backends/cuda/launch.py", "bases[base] + offset", "bases[base]"),
    ("qkernels/backends/cuda/launch.py", "words[word] = stream", "words[word] = 0"),
    ("qkernels/ops/operator_plans.py", "weakref.ref(first, lambda _: forget())", "weakref.ref(first)"),
]  # fmt: skip

COUNTERS = [
    ("qkernels/counters.py", "capture_of(stream) if stream else 0", "0"),
    ("qkernels/counters.py", "key = (device, stream,", "key = (device, 0,"),
    ("qkernels/counters.py", "known[1] >= count", "True"),
    ("qkernels/counters.py", "capture != UNKNOWN and", ""),
    ("qkernels/counters.py", "    if capture == 0:\n        _allocate(device)", "    _allocate(device)"),
    ("qkernels/counters.py", "arena.used += size", "pass"),
    ("qkernels/counters.py", "arena.used + size <=", "arena.used <="),
    ("qkernels/counters.py", "(0, number, UNKNOWN)", "(0, 1, UNKNOWN)"),
    ("qkernels/counters.py", "_apart(lambda: _zeros(device))", "_zeros(device)"),
    ("qkernels/weights/packed.py", "counters.reserve(", "id("),
    ("qkernels/weights/experts.py", "counters.reserve(", "id("),
    (PLAN, "self._counters = max(self._counters, count)", "self._counters = 1"),
]  # fmt: skip

EIGHT_BIT = [
    (GEMM8, "moved = ((bits & 0x80) << 8 | (bits & 0x7F) << 7)", "moved = ((bits & 0x80) << 8 | (bits & 0x7F) << 6)"),
    (GEMM8, "value *= 256.0", "value *= 128.0"),
    (GEMM8, "(codes & 0x7F) == 0x7F", "(codes & 0x7F) == 0x80"),
    (GEMM8, "mask=(k < KP)[None, :], other=0.0", "mask=(k < KP - 16)[None, :], other=0.0"),
    (GEMM8, "x_scale_ptr + step * M + m", "x_scale_ptr + m"),
    (GEMM8, "first_n // STEP * blocks_k + step", "first_n // STEP * blocks_k"),
    (GEMM8, "first_n // STEP * blocks_k + step", "step"),
    (GEMM8, "tl.load(w_scale_ptr + n)[:, None]", "tl.load(w_scale_ptr + first_n)"),
    (GEMM8, "x_scale_ptr + (m * 0 if ONE_SCALE else m)", "x_scale_ptr + m * 0"),
    (GEMM8, "acc -= tl.load(row_sum_ptr + n)", "acc += tl.load(row_sum_ptr + n)"),
    (GEMM8, "for start in range(0, count, COLUMNS):", "for start in range(0, count - COLUMNS, COLUMNS):"),
    (GEMM8, "live = start + i < count", "live = start + i < count - 1"),
    (GEMM8, "x -= coded * scale", "x -= coded * 0"),
    (GEMM8, "tl.where(tl.abs(x) >= threshold, x, 0.0)", "x"),
    (GEMM8, "begin = tl.program_id(1) * slice_steps", "begin = 0"),
    (BLOCKS, "for s in range(SPLIT_K):", "for s in range(SPLIT_K - 1):"),
    (GEMM8, "for s in range(K_SLICES):", "for s in range(1, K_SLICES):"),
    (BLOCKS, "tl.store(counter_ptr + pid, 0)", "tl.store(counter_ptr + pid, 1)"),
    (BLOCKS, "group_n = tl.minimum(blocks_n - first_n, GROUP_N)", "group_n = GROUP_N"),
    (GEMM8, "y += tl.load(bias_ptr + n)", "y += 0 * tl.load(bias_ptr + n)"),
    (GEMM8, "mask=(n < N)[:, None] & (m < M)[None, :])", "mask=(n < N - 1)[:, None] & (m < M)[None, :])"),
    (ACTIVATIONS, "(value + 12582912.0) - 12582912.0", "(value + 25165824.0) - 25165824.0"),
    (ACTIVATIONS, "(size + 0x7FFFF + ((size >> 20) & 1)) >> 20", "(size + 0x80000) >> 20"),
    (ACTIVATIONS, "tl.minimum(normal, 0x7E)", "tl.minimum(normal, 0x7F)"),
    (ACTIVATIONS, "size < 0x3C800000", "size < 0x3C000000"),
    (ACTIVATIONS, "tl.where(size > 0x7F800000, 0x7F, code)", "tl.where(size > 0x7F800000, 0x7E, code)"),
    (ACTIVATIONS, "scale < TOKEN_FLOOR, TOKEN_FLOOR, scale", "scale < TOKEN_FLOOR, scale, scale"),
    (ACTIVATIONS, "absmax < GROUP_AMAX_FLOOR, GROUP_AMAX_FLOOR, absmax", "absmax < GROUP_AMAX_FLOOR, absmax, absmax"),
    (ACTIVATIONS, "group * M + row", "group + row"),
    (ACTIVATIONS, "size = tl.where(tl.abs(x) >= threshold, 0, size)", "size = tl.where(tl.abs(x) > threshold, 0, size)"),
    (ACTIVATIONS, "value = tl.where(tl.abs(x) >= threshold, 0.0, value)", "value = value * 1.0"),
    (ACTIVATIONS, "tl.clamp(value, -128.0, 127.0)", "tl.clamp(value, -127.0, 127.0)"),
    (ACTIVATIONS, "tl.where(k < K, tl.clamp(", "tl.where(k < KP, tl.clamp("),
    (ACTIVATIONS, "(BLOCK, K, BLOCK):\n        more", "(BLOCK, K - 1, BLOCK):\n        more"),
    (ACTIVATIONS, "(BLOCK, K, BLOCK):\n            more", "(BLOCK, K - 1, BLOCK):\n            more"),
    (ACTIVATIONS, "(BLOCK, K, BLOCK):\n        x", "(BLOCK, K - 1, BLOCK):\n        x"),
    (ACTIVATIONS, "count + tl.cumsum(flag, 0) - flag", "count + tl.cumsum(flag, 0)"),
    (ACTIVATIONS, "tl.store(counter_ptr + 1 + here, flag * 0", "tl.store(counter_ptr + 1 + here, flag"),
    (ACTIVATIONS, "tl.store(counter_ptr, 0)", "tl.store(counter_ptr, 1)"),
    (ACTIVATIONS, "x = _as(_as(x * inverse, DTYPE) * weight, DTYPE)", "x = _as(x * inverse * weight, DTYPE)"),
    (LAYOUT8, "(0, padded(k) - k)", "(padded(k) - k, 0)"),
    (LAYOUT8, "weight.sum(dim=1, dtype=torch.int32)", "weight.sum(dim=1, dtype=torch.int8)"),
    (LAUNCH8, "layout.padded(shape[1]) % STEP == 0", "layout.padded(shape[1]) % 16 == 0"),
]  # fmt: skip

INCOHERENT = [
    (KRONECKER, "return (i ^ (i >> 1)) & 1", "return (i ^ (i >> 3)) & 1"),
    (KRONECKER, "at = i[:, None] * A + j[None, :] if TRANSPOSED", "at = i[:, None] * A + j[None, :] if A < 0"),
    (KRONECKER, "box - high, factor, tl.dot(high", "box - box, factor, tl.dot(high"),
    (KRONECKER, ".permute(0, 3, 1, 2)", ".permute(0, 3, 2, 1)"),
    (KRONECKER, "_odd_bits(program_c & c)", "_odd_bits(program_c ^ c)"),
    (KRONECKER, "at = c * C + program_c if TRANSPOSED", "at = program_c * C + c if TRANSPOSED"),
    (KRONECKER, "source = (i0 * C + c)", "source = (i0 * C + program_c)"),
    (KRONECKER, "target = (i0 * C + program_c)", "target = (i0 * C + C - 1 - own)"),
    (KRONECKER, "tl.load(pre_ptr + source", "tl.load(pre_ptr + (i0 * C + c)[:, None] * (A1 * A2) + rest"),
    (KRONECKER, "tl.load(post_ptr + target", "tl.load(post_ptr + (i0 * C + program_c)[:, None] * (A1 * A2) + rest"),
    (KRONECKER, "tl.load(bias_ptr + target", "0 * tl.load(bias_ptr + target"),
    (KRONECKER, "target % 16 // 8 * 4", "target % 16 // 8 * 2"),
    (KRONECKER, "live = inside & (m < M)[:, None]", "live = inside & (m < M - 1)[:, None]"),
    (KRONECKER, "box.reshape(ROWS * B0 * B1, B2) * scale", "box.reshape(ROWS * B0 * B1, B2)"),
    (TRANSFORMS, "empty = plan.empty if width == x.shape[1] else plan.zeros", "empty = work.empty"),
    (TRANSFORMS, "rows = max(1, 16 * max(padded) // total)", "rows = max(2, 16 * max(padded) // total) - 1"),
    (DECODERS, "p = p ^ (p >> 2)", "p = p ^ (p >> 3)"),
    (DECODERS, "signs = signs ^ p", "signs = signs + 0 * p"),
    (DECODERS, "flips = (signs << 1) | (signs << 2)", "flips = signs | (signs << 1) | (signs << 2)"),
    (DECODERS, "tl.load(table + ((code >> 8) & 255))", "tl.load(table + (code & 255))"),
    (DECODERS, "_e8p(words >> 16, table), DTYPE)", "_e8p(words, table), DTYPE)"),
    (DECODERS, "RESIDUAL: tl.constexpr = 1 / 3.45", "RESIDUAL: tl.constexpr = 1 / 3.5"),
    (DECODERS, "RESIDUAL: tl.constexpr = 1 / 2.04", "RESIDUAL: tl.constexpr = 1 / 2.0"),
    (DECODERS, "MIDDLE: tl.constexpr = OFFSET + 8", "MIDDLE: tl.constexpr = OFFSET + 7.5"),
    (DECODERS, "- ((1 << BITS) - 1) * 0.5", "- (1 << BITS) * 0.5"),
    (KERNEL, "acc *= scale.to(tl.float32)", "acc *= 1"),
    (KERNEL, "high = tl.join(high, high >> TRAITS.high_step)", "high = tl.join(high, high >> 1)"),
    (LAYOUT, "halves[:, :, :, 0] | (halves[:, :, :, 1] << 16)", "halves[:, :, :, 1] | (halves[:, :, :, 0] << 16)"),
    (CODECS, "return 16 if self.codebook", "return 8 if self.codebook"),
]  # fmt: skip

EXPERTS = [
    (EXPERTS_KERNEL, "(expert < EXPERTS), expert", "(expert <= EXPERTS + 1), expert"),
    (EXPERTS_KERNEL, "(expert >= 0) & ", ""),
    (EXPERTS_KERNEL, "tl.cumsum(flag, 0) - flag", "tl.cumsum(flag, 0)"),
    (EXPERTS_KERNEL, "written += tl.sum(flag, 0)", "written += 0"),
    (EXPERTS_KERNEL, "mask=padding < count * BLOCK_M)", "mask=padding < count)"),
    (EXPERTS_KERNEL, "i * 0 - 1, mask", "i * 0, mask"),
    (EXPERTS_KERNEL, "bins < expert, blocks, 0", "bins <= expert, blocks, 0"),
    (BLOCKS, "group_n = tl.minimum(blocks_n - first_n, GROUP_N)", "group_n = GROUP_N"),
    (EXPERTS_KERNEL, "pointers[0] + expert * strides[0]", "pointers[0]"),
    (EXPERTS_KERNEL, "pointers[i] + expert * strides[i]", "pointers[i]"),
    (EXPERTS_KERNEL, "bias_ptr + expert * N + rows", "bias_ptr + rows"),
    (EXPERTS_KERNEL, "weights_ptr + slots, mask", "weights_ptr + slots * 0, mask"),
    (EXPERTS_KERNEL, "acc = tl.where(here, acc, 0.0)", "acc = acc + 0.0"),
    (EXPERTS_KERNEL, "slots // PER_ROW, M)", "slots, M)"),
    (EXPERTS_KERNEL, "weight = _expert_pointers(weight_args, weight_strides, e)", "weight = weight_args"),
    (EXPERTS_KERNEL, "weight_ptr + e * weight_stride", "weight_ptr"),
    (EXPERTS_KERNEL, "w_scale_ptr += e * w_scale_stride", "w_scale_ptr += 0"),
    (EXPERTS_KERNEL, "slots // PER_ROW, 0)", "slots, 0)"),
    (EXPERTS_KERNEL, "tl.load(row + N, ", "tl.load(row, "),
    (EXPERTS_KERNEL, "slot = token * TOP_K + choice", "slot = token * TOP_K"),
    (EXPERTS_LAUNCH, "used = min(slots, experts + 1)", "used = min(slots, experts)"),
    (EXPERTS_LAUNCH, "block_m = min(first.block_m, second.block_m)", "block_m = first.block_m"),
]  # fmt: skip

#: reads and writes beyond a tensor, of which the interpreter says nothing
BEYOND = [
    (SCALING, "kk = tl.minimum(kk, K - 1)", "kk = tl.minimum(kk, K)"),
    (SCALING, "kk = tl.minimum(kk, KP - 1)", "kk = tl.minimum(kk, KP)"),
    (SCALING, "tl.minimum(kk, KP - 1) // 256", "tl.minimum(kk, KP) // 256"),
    (KERNEL, "at[:, None] * 16 + i[None, :], mask=(memory_rows < N)", "at[:, None] * 16 + i[None, :], mask=(memory_rows <= N)"),
    (KERNEL, "tl.load(bias_ptr + rows, mask=rows < N", "tl.load(bias_ptr + rows, mask=rows <= N"),
    (KERNEL, "        live = kk < K", "        live = kk <= K"),
    (KERNEL, "offsets_ptr + rows + 1, mask=rows < N", "offsets_ptr + rows + 1, mask=rows <= N"),
    (ACTIVATIONS, "tl.load(x_row + k, mask=k < K,", "tl.load(x_row + k, mask=k <= K,"),
    (ACTIVATIONS, "tl.store(q_row + here, q, mask=here < KP)", "tl.store(q_row + here, q, mask=here <= KP)"),
    ("triton_kernels/gather.py", "mask=kk < KP, other=-1", "mask=kk <= KP, other=-1"),
    ("triton_kernels/eight_bit.py", "n = tl.minimum(first_n + r, N - 1)", "n = tl.minimum(first_n + r, N)"),
    ("triton_kernels/eight_bit.py", "w_rows + k[None, :], mask=(k < KP)", "w_rows + k[None, :], mask=(k <= KP)"),
    ("triton_kernels/experts.py", "e = tl.minimum(expert, EXPERTS - 1).to", "e = tl.minimum(expert, EXPERTS).to"),
]  # fmt: skip

FLOORS = [
    ("qkernels/formats/fp8.py", "_GROUP_AMAX_FLOOR = 1e-4", "_GROUP_AMAX_FLOOR = 1e-10"),
    ("qkernels/formats/fp8.py", "_TOKEN_FLOOR = 1 / (448 * 512)", "_TOKEN_FLOOR = 1e-10"),
    (ACTIVATIONS, "GROUP_AMAX_FLOOR = tl.constexpr(1e-4)", "GROUP_AMAX_FLOOR = tl.constexpr(1e-10)"),
]  # fmt: skip

#: what makes the sum of a row depend on the rows that come with it
INVARIANT = [
    (LAUNCH, "all_blocks = blocks_n if problem.batch_invariant else", "all_blocks = blocks_n if False else"),
    (LAUNCH8, "all_blocks = blocks_n if problem.batch_invariant else", "all_blocks = blocks_n if False else"),
    (LAUNCH, "    if problem.batch_invariant:\n        return config.post_scale\n", "    if problem.batch_invariant:\n        return problem.m < 70\n"),
    (LAUNCH, 'and not traits.last_scale and not problem.batch_invariant', 'and not traits.last_scale'),
    (LAUNCH, "few = problem.m <= transforms.DECODE_ROWS or problem.batch_invariant", "few = problem.m <= transforms.DECODE_ROWS"),
    (LAUNCH8, '"BY_ELEMENT": problem.batch_invariant', '"BY_ELEMENT": False'),
    (CONFIGS, "    if batch_invariant:\n        name", "    if batch_invariant and m > 64:\n        name"),
    (CONFIGS, "BATCH_INVARIANT[name]._replace(block_m=_INVARIANT_BLOCK_M[m_class(m)])", "BATCH_INVARIANT[name]._replace(block_m=_INVARIANT_BLOCK_M[m_class(m)], k_slices=1 + (m > 100))"),
    (KERNEL, "acc += scales[part]", "acc += (1 + 1e-6 * (BLOCK_M > 16)) * scales[part]"),
    (KERNEL, "kk = first + part * SCALE_GROUP", "kk = first + part * SCALE_GROUP * (BLOCK_M <= 16)"),
    (GEMM8, "tl.load(w_scale_ptr + n)[:, None]", "tl.load(w_scale_ptr + n)[:, None] * (1 + 1e-3 * (BLOCK_M > 16))"),
    (KERNEL, "for s in range(K_SLICES):", "for s in range(1, K_SLICES):"),
]  # fmt: skip

#: what to break, and the tests that must notice
SUITES = (
    (WEIGHT_ONLY, ("tests/kernels/test_decoders.py", "tests/kernels/test_weight_only.py")),
    (
        PLANS,
        ("tests/kernels/test_launch.py", "tests/cuda/test_launch.py", "tests/cuda/test_slices.py"),
    ),
    (COUNTERS, ("tests/test_counters.py",)),
    (
        EIGHT_BIT,
        (
            "tests/kernels/test_activations.py",
            "tests/kernels/test_eight_bit.py",
            "tests/kernels/test_outlier_columns.py",
        ),
    ),
    (INCOHERENT, ("tests/kernels/test_incoherent.py",)),
    (EXPERTS, ("tests/kernels/test_experts.py",)),
    (BEYOND, ("tests/kernels/test_guarded.py",)),
    (FLOORS, ("tests/kernels/test_activation_floors.py",)),
    (INVARIANT, ("tests/kernels/test_batch_invariant.py",)),
)
