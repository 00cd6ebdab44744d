// Calls the service with connect-node and the stubs that buf generates from the proto into `generated`.
//     node connect.js HOST:PORT SEED NUM_SAMPLES
// Prints one JSON object; bytes are in base64.
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { DataType, VaeService } from "./generated/vae/v1/vae_pb.js";

const [target, seed, numSamples] = process.argv.slice(2);
const transport = createGrpcTransport({ baseUrl: `http://${target}` });
const client = createClient(VaeService, transport);

const sample = await client.sample({ numSamples: Number(numSamples), seed: BigInt(seed) });

const stream = { firstRows: [], samples: [] };
for await (const chunk of client.sampleStream({
  numSamples: BigInt(numSamples),
  seed: BigInt(seed),
  maxChunkRows: 3,
})) {
  stream.firstRows.push(Number(chunk.firstRow));
  stream.samples.push(chunk.samples.data);
}

// Aborting ends the call; leaving the loop alone would not.
const enough = new AbortController();
const many = { numSamples: 1_000_000n, seed: BigInt(seed), maxChunkRows: 1 };
for await (const _ of client.sampleStream(many, { signal: enough.signal })) {
  enough.abort();
  break;
}

const { shape } = sample.samples;
const data = { dtype: DataType.UINT8, shape, data: new Uint8Array(16 * numSamples) };
const score = await client.score({ data, seed: BigInt(seed) });

const error = await client.sample({ numSamples: 0 }).then(
  () => null,
  (problem) => {
    const { code, metadata } = ConnectError.from(problem);
    const name = Code[code].replace(/(?<=[a-z])(?=[A-Z])/g, "_").toUpperCase();
    return { code: name, reason: metadata.get("vae-error-reason"), field: metadata.get("vae-error-field") };
  },
);

const answer = {
  seed: String(sample.seed),
  sample: Buffer.from(sample.samples.data).toString("base64"),
  firstRows: stream.firstRows,
  stream: Buffer.concat(stream.samples).toString("base64"),
  score: Buffer.from(score.score.data).toString("base64"),
  error,
};
console.log(JSON.stringify(answer));
