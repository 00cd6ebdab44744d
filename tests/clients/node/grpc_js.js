// Calls the service with grpc-js, which reads the proto when it starts: no stubs.
//     node grpc_js.js HOST:PORT PROTO SEED NUM_SAMPLES
// Prints one JSON object; bytes are in base64.
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const [target, proto, seed, numSamples] = process.argv.slice(2);
// Seeds have 64 bits and numbers of JavaScript 53: as strings they stay what they are.
const definition = loadSync(proto, { longs: String, enums: String, defaults: true });
const { VaeService } = grpc.loadPackageDefinition(definition).vae.v1;
const client = new VaeService(target, grpc.credentials.createInsecure());

const call = (method, request) =>
  new Promise((resolve, reject) =>
    client[method](request, { deadline: Date.now() + 20_000 }, (error, response) =>
      error ? reject(error) : resolve(response),
    ),
  );

const sample = await call("sample", { numSamples, seed });

const stream = { firstRows: [], samples: [] };
for await (const chunk of client.sampleStream({ numSamples, seed, maxChunkRows: 3 })) {
  stream.firstRows.push(Number(chunk.firstRow));
  stream.samples.push(chunk.samples.data);
}

// Reading the first chunk only ends the call.
const left = client.sampleStream({ numSamples: 1_000_000, seed, maxChunkRows: 1 });
for await (const _ of left) {
  left.cancel();
  break;
}

const data = { dtype: "DATA_TYPE_UINT8", shape: sample.samples.shape, data: Buffer.alloc(16 * numSamples) };
const score = await call("score", { data, seed });

const error = await call("sample", { numSamples: 0 }).then(
  () => null,
  (problem) => ({
    code: grpc.status[problem.code],
    reason: problem.metadata.get("vae-error-reason")[0],
    field: problem.metadata.get("vae-error-field")[0],
  }),
);

const answer = {
  seed: sample.seed,
  sample: sample.samples.data.toString("base64"),
  firstRows: stream.firstRows,
  stream: Buffer.concat(stream.samples).toString("base64"),
  score: score.score.data.toString("base64"),
  error,
};
console.log(JSON.stringify(answer));
client.close();
