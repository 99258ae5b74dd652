// Runs a graph with adapter inputs in JavaScript, fed from safetensors files:
//
//     node run_graph.mjs onnxruntime-node|onnxruntime-web model.onnx tensors.safetensors ...
//
// The files hold the graph's inputs by name: the model's own, and the adapter's as
// gauge_ext.export.write_onnx_adapter(adapter, graph, "a.safetensors") writes them. Prints one JSON
// object: each output's dims and data, and the version of the runtime.
import { readFileSync } from "node:fs";

const ARRAYS = {
  F32: ["float32", Float32Array],
  F16: ["float16", Uint16Array],
  I8: ["int8", Int8Array],
  I64: ["int64", BigInt64Array],
};

function readTensors(ort, path) {
  const file = readFileSync(path);
  const length = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.subarray(8, 8 + length).toString("utf8"));
  delete header.__metadata__;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
    const [type, Kind] = ARRAYS[dtype];
    // A copy, since a typed array must begin at a multiple of its element's size.
    const bytes = Uint8Array.from(file.subarray(8 + length + start, 8 + length + end));
    tensors[name] = new ort.Tensor(type, new Kind(bytes.buffer), shape);
  }
  return tensors;
}

const [runtime, graph, ...files] = process.argv.slice(2);
const ort = await import(runtime);
const node = runtime === "onnxruntime-node";
if (!node) ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(graph)), {
  executionProviders: [node ? "cpu" : "wasm"],
  logSeverityLevel: 3,
});
const feeds = Object.assign({}, ...files.map((path) => readTensors(ort, path)));
const outputs = await session.run(feeds);
const shown = Object.entries(outputs).map(([name, { dims, data }]) => [
  name,
  { dims, data: Array.from(data) },
]);
const versions = ort.env.versions;
console.log(
  JSON.stringify({
    version: node ? versions.node ?? versions.common : versions.web ?? versions.common,
    outputs: Object.fromEntries(shown),
  }),
);
