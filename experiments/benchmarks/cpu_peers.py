"""What else multiplies 4-bit matrices on a CPU: ONNX Runtime and OpenVINO, where installed.

Each is given the same codes and scales: (code - 8) * scale in groups of 128 along K.
"""

from collections.abc import Callable

import numpy as np

GROUP = 128
ZERO = 8
Product = Callable[[np.ndarray], np.ndarray]


def onnxruntime_product(codes: np.ndarray, scale: np.ndarray, threads: int) -> Product | None:
    """`MatMulNBits` at accuracy level 4 (int8 activations, per group of K).

    Args:
        codes: [K, N] of 0 .. 15.
        scale: float32 [K / 128, N].
        threads: To run on.

    Returns:
        A function of x float32 [M, K]; None where onnx or onnxruntime is missing.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    k, n = codes.shape
    blocks = codes.T.reshape(n, k // GROUP, GROUP // 2, 2).astype(np.uint8)
    packed = blocks[..., 0] | blocks[..., 1] << 4
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scale"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, k])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, n])],
        [
            numpy_helper.from_array(packed, "codes"),
            numpy_helper.from_array(np.ascontiguousarray(scale.T).reshape(-1), "scale"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})[0]


def openvino_product(codes: np.ndarray, scale: np.ndarray, threads: int) -> Product | None:
    """u4 weights with dynamically quantized activations; arguments as `onnxruntime_product`."""
    try:
        import openvino
        from openvino import opset13 as ops
    except ImportError:
        return None
    k, n = codes.shape
    nibbles = codes.T.reshape(-1, 2).astype(np.uint8)
    packed = nibbles[:, 0] | nibbles[:, 1] << 4
    shape = [n, k // GROUP, GROUP]
    # A tensor of a packed type borrows the array's memory: filled in, it owns its own.
    tensor = openvino.Tensor(openvino.Type.u4, openvino.Shape(shape))
    tensor.data.reshape(-1)[:] = packed
    weights = ops.constant(tensor)
    centred = ops.subtract(
        ops.convert(weights, openvino.Type.f16), ops.constant(np.float16(ZERO).reshape(1, 1, 1))
    )
    # The scales of its own compressed models are float16.
    spread = np.ascontiguousarray(scale.T).astype(np.float16).reshape(n, k // GROUP, 1)
    scaled = ops.multiply(centred, ops.constant(spread))
    merged = ops.convert(ops.reshape(scaled, [n, k], False), openvino.Type.f32)
    x = ops.parameter([-1, k], openvino.Type.f32)
    product = ops.matmul(x, merged, False, True)
    core = openvino.Core()
    properties = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
        "INFERENCE_NUM_THREADS": str(threads),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(openvino.Model([product], [x]), "CPU", properties)
    request = compiled.create_infer_request()

    def run(x: np.ndarray) -> np.ndarray:
        return request.infer({0: x}, share_inputs=True, share_outputs=True)[0]

    return run
