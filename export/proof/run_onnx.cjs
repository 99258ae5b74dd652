// Runs an ONNX file in onnxruntime-node or onnxruntime-web, for gauge_ext.export.runtimes.
// Arguments: the package's folder, the file. For each line of JSON on stdin, a line on stdout.
"use strict";
const fs = require("fs");
const path = require("path");
const readline = require("readline");

const [, , folder, file] = process.argv;
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, int64: BigInt64Array,
  int32: Int32Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array,
};

const answer = (value) => fs.writeSync(1, JSON.stringify(value) + "\n");

function bytes(array) {
  return Buffer.from(array.buffer, array.byteOffset, array.byteLength);
}

// A pooled Buffer may begin at any byte; a typed array may not.
function typed(kind, name) {
  const data = fs.readFileSync(name);
  const copy = new Uint8Array(data.length);
  copy.set(data);
  return new ARRAYS[kind](copy.buffer);
}

async function main() {
  const ort = require(folder);
  const { version } = JSON.parse(fs.readFileSync(path.join(folder, "package.json")));
  const web = path.basename(folder) === "onnxruntime-web";
  const options = { executionProviders: [web ? "wasm" : "cpu"], logSeverityLevel: 3 };
  let model = file;
  if (web) {
    ort.env.wasm.numThreads = 1;
    model = new Uint8Array(fs.readFileSync(file));
    const data = file + ".data";
    if (fs.existsSync(data)) {
      const entry = { path: path.basename(data), data: new Uint8Array(fs.readFileSync(data)) };
      options.externalData = [entry];
    }
  }
  const session = await ort.InferenceSession.create(model, options);
  answer({ version, provider: web ? "wasm" : "CPU" });
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const request = JSON.parse(line);
    try {
      const feeds = {};
      request.inputs.forEach(({ name, type, dims }, index) => {
        const data = typed(type, path.join(request.folder, "in" + index));
        feeds[name] = new ort.Tensor(type, data, dims);
      });
      const begin = process.hrtime.bigint();
      const results = await session.run(feeds, request.outputs);
      const seconds = Number(process.hrtime.bigint() - begin) / 1e9;
      const outputs = request.outputs.map((name, index) => {
        const tensor = results[name];
        fs.writeFileSync(path.join(request.folder, "out" + index), bytes(tensor.data));
        return { type: tensor.type, dims: tensor.dims };
      });
      answer({ outputs, seconds });
    } catch (error) {
      answer({ error: String(error.message || error) });
    }
  }
}

main().catch((error) => {
  answer({ error: String(error.message || error) });
  process.exit(1);
});
