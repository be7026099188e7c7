"""Mutations of calibration, and resumed quantization."""

from __future__ import annotations

ALGORITHMS, CALIBRATION = "qkernels/quantizers/algorithms.py", "qkernels/quantizers/calibration.py"
DRIVER = "qkernels/quantizers/driver.py"
DIGEST = "qkernels/quantizers/digest.py"

CALIBRATED = [
    (ALGORITHMS, "grid = spqr_search.spqr(weight, hessian,", "grid = spqr_search.spqr(weight, None,"),
    (ALGORITHMS, "**options, **self.settings)", "**options)"),
    (ALGORITHMS, "packed[name] = self.rounded(linears[name].weight, hessian=hessian)", "packed[name] = self.rounded(linears[name].weight)"),
    (ALGORITHMS, "                hessian,\n", "                torch.eye(len(hessian)),\n"),
    (ALGORITHMS, "                hessian,\n", "                hessian.diag().diag(),\n"),
    (ALGORITHMS, "                **self.settings,", "                **self.options,"),
    (ALGORITHMS, 'act_order=resolved[0].get("act_order", False)', "act_order=False"),
    (ALGORITHMS, "                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)\n                linears[name].weight.copy_(packed[name].dequantize())", "                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)"),
    (ALGORITHMS, "                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)\n                linears[name].weight.copy_(packed[name].dequantize())\n        return packed\n\n\nclass Ldlq", "                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)\n        return packed\n\n\nclass Ldlq"),
    (ALGORITHMS, "(weight.shape[0], weight.shape[1])\n                params = self.fmt.resolve(shape, self.params)", "(weight.shape[0], weight.shape[1])\n                hessian = hessian.flip(0, 1)\n                params = self.fmt.resolve(shape, self.params)"),
    (ALGORITHMS, "                packed[name] = self.rounded(linears[name].weight, hessian=hessian)\n                linears[name].weight.copy_(packed[name].dequantize())", "                packed[name] = self.rounded(linears[name].weight, hessian=hessian)"),
    (ALGORITHMS, "stacked, shared.hessian, shared.mean_abs,", "stacked, shared.hessian, shared.max_abs,"),
    (ALGORITHMS, "stacked, shared.hessian,", "stacked, torch.eye(len(shared.hessian)),"),
    (ALGORITHMS, "for name in names:\n                    statistics[name].rescale(scale)", "for name in names:\n                    statistics[name].rescale(scale * 0 + 1)"),
    (ALGORITHMS, "awq.search_clip(weight, statistics[name].hessian,", "awq.search_clip(weight, torch.eye(weight.shape[1]),"),
    (ALGORITHMS, "statistics[rule.layers[0]].max_abs, weights", "statistics[rule.layers[0]].mean_abs, weights"),
    (ALGORITHMS, "for name in rule.layers:\n                    statistics[name].rescale(scale)", "for name in rule.layers:\n                    statistics[name].rescale(scale * 0 + 1)"),
    (ALGORITHMS, 'weights, self.settings["alpha"]', 'weights, self.options["alpha"]'),
    (ALGORITHMS, "largest = float(statistics[name].max_abs.max())", "largest = float(statistics[name].max_abs.mean())"),
    (ALGORITHMS, "largest = float(statistics[name].max_abs.max())", "largest = float(max(f.max_abs.max() for f in statistics.values()))"),
    (ALGORITHMS, '{"importance": statistics[name].mean_square} if weighted else {}', "{}"),
    (ALGORITHMS, '{"importance": statistics[name].mean_square}', '{"importance": statistics[name].mean_abs}'),
    (ALGORITHMS, '{"importance": statistics[name].mean_square}', '{"importance": statistics[name].mean_square.flip(0)}'),
    (CALIBRATION, "self._sum.addmm_(x.T, x)", "self._sum = x.T @ x"),
    (CALIBRATION, "self._sum_square += magnitude.square().sum(0)", "self._sum_square += magnitude.square().mean(0)"),
    (CALIBRATION, "self._sum_abs += magnitude.sum(0)", "self._sum_abs += magnitude.mean(0)"),
    (CALIBRATION, "torch.maximum(self.max_abs, magnitude.amax(0))", "magnitude.amax(0)"),
    (CALIBRATION, "statistics[name].add(args[0])", "statistics[min(statistics)].add(args[0])"),
    (CALIBRATION, "for args, kwargs in self._calls:\n                left", "for args, kwargs in self._calls[:1]:\n                left"),
    (CALIBRATION, "            out = block(*args, **kwargs)", "            out = args[0]"),
    (DRIVER, "                inputs.advance(block)", "                pass"),
    (DRIVER, "                layers[name].weight.copy_(weight.dequantize())", "                pass"),
    (DRIVER, "inputs = BlockInputs(model, blocks[0][1], batches)", "inputs = BlockInputs(model, blocks[0][1], batches[::-1][:1])"),
]  # fmt: skip

RESUMED = [
    (DRIVER, '        "model": digest.of_model(model),\n', ""),
    (DRIVER, '        "calibration": digest.of_tensors((str(i), batch) for i, batch in enumerate(batches)),\n', ""),
    (DRIVER, '        "params": algorithm.params,\n', ""),
    (DRIVER, '        "settings": algorithm.settings,\n', ""),
    (DRIVER, '        "algorithm": algorithm.name,\n', ""),
    (DRIVER, '        "format": algorithm.fmt.name,\n', ""),
    (DRIVER, '        "layers": sorted(linears),\n', ""),
    (DRIVER, '        "version": f"{__version__}, files {_FILES}",\n', ""),
    (DRIVER, "if metadata.get(key) != value:", "if False:"),
    (DRIVER, '"job": self.job, "block": str(number)}.items()', '"job": self.job}.items()'),
    (DRIVER, "        if differing:", "        if False:"),
    (DRIVER, "if (tensor.dtype, tensor.shape) != (parameter.dtype, parameter.shape):", "if tensor.dtype != parameter.dtype:"),
    (DRIVER, "if (tensor.dtype, tensor.shape) != (parameter.dtype, parameter.shape):", "if tensor.shape != parameter.shape:"),
    (DRIVER, 'parameter.data.copy_(tensors[f"plain.{name}"])', "pass"),
    (DRIVER, "any(not file.name.startswith(atomic.PREFIX) for file", "any(True for file"),
    (DRIVER, "except (SafetensorError, OSError, ValueError)", "except OSError"),
    (DIGEST, "model.named_parameters(remove_duplicate=False)", "model.model.layers.named_parameters(remove_duplicate=False)"),
    (DIGEST, "*model.named_buffers(remove_duplicate=False)", ""),
    (DIGEST, "[modules, tensors, values]", "[modules, tensors]"),
    (DIGEST, "[modules, tensors, values]", "[tensors, values]"),
    (DIGEST, " {m.extra_repr()}", ""),
    (DIGEST, " {type(m).__qualname__}", ""),
    (DIGEST, "{name} {tensor.dtype} {tuple(tensor.shape)} {first_name}", "{name} {tuple(tensor.shape)} {first_name}"),
    (DIGEST, "{name} {tensor.dtype} {tuple(tensor.shape)} {first_name}", "{name} {tensor.dtype} {first_name}"),
    (DIGEST, "{name} {tensor.dtype} {tuple(tensor.shape)} {first_name}", "{name} {tensor.dtype} {tuple(tensor.shape)}"),
    (DIGEST, "for part in rows.split(rows_at_once):", "for part in rows.split(rows_at_once)[:1]:"),
    (DIGEST, "for part in rows.split(rows_at_once):", "for part in rows[:-1].split(rows_at_once):"),
    (DIGEST, "if key not in _IGNORED_KEYS", "if key"),
]  # fmt: skip

#: what to break, and the tests that must notice
SUITES = (
    (CALIBRATED, ("tests/quantizers/test_calibration.py",)),
    (RESUMED, ("tests/quantizers/test_resume.py",)),
)
