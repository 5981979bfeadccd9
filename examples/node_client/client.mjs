// Streams an answer from a running server (`stepwire serve smollm2-135m`).
//
//   npm install && node client.mjs [HOST:PORT] [PROMPT]
//
// Nothing is generated: the messages come from the .proto files of this repository.
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../protos", import.meta.url));
const definition = protoLoader.loadSync("stepwire/scheduler/v1/generation.proto", {
  includeDirs: [protos],
  keepCase: true,
  defaults: true,
  longs: String,
  enums: String,
  oneofs: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).stepwire.scheduler.v1;

const [address = "127.0.0.1:50051", prompt = "What is the capital of France?"] =
  process.argv.slice(2);
const client = new GenerationService(address, grpc.credentials.createInsecure());

const call = client.GenerateStream({
  input: {
    chat: { messages: [{ role: "user", content: prompt }] },
    sampling_params: { temperature: 0, max_tokens: 64 },
  },
});
// Ctrl-C tells the server, which frees what the request held.
process.once("SIGINT", () => call.cancel());

call.on("data", ({ event, output, completed }) => {
  if (event === "output") {
    process.stdout.write(output.text);
  } else if (event === "completed") {
    const { usage, timings } = completed;
    console.log(`\n[${usage.num_output_tokens} tokens, TTFT ${timings.ttft_ms.toFixed(0)} ms]`);
  }
});
call.on("error", (error) => {
  console.error(`error: ${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
call.on("end", () => client.close());
