"""How other programs store one quantized kernel: arrays in, a QTensor out, and back; no files.

| module | what it knows |
|---|---|
| gptq | GPTQ v1 and v2: 2, 3, 4 and 8 bits, activation order |
| awq | AWQ's GEMM layout |
| compressed_tensors | pack-quantized, int-quantized, float-quantized, NVFP4, MXFP4 |
| bitsandbytes | NF4, with and without double quantization |
| bitnet | ternary kernels of transformers' BitLinear |
| ggml_blocks | Q4_0, Q8_0, TQ1_0, TQ2_0 and MXFP4 of GGUF |

Law: `decode` gives the codes, zero points and scales that are in the arrays, none rounded again;
`encode(decode(arrays))` gives the same bytes. What `encode` cannot hold it refuses: with
`NotImplementedError` where the format has no such scheme, with its subclass `DoesNotFit` where it
has, and only this kernel's shape does not fit.
"""
