// node engine.cjs PACKAGE MODEL HEIGHT WIDTH CHANNELS < pixels: what one of onnxruntime's builds for node says of them.
const fs = require("fs");

async function main() {
  const [name, model, ...size] = process.argv.slice(2);
  const runtime = require(require.resolve(name, { paths: [process.cwd()] }));
  if (name === "onnxruntime-web") runtime.env.wasm.numThreads = 1;
  const session = await runtime.InferenceSession.create(new Uint8Array(fs.readFileSync(model)));
  const pixels = new Uint8Array(fs.readFileSync(0));
  const [height, width, channels] = size.map(Number);
  const shape = [pixels.length / (height * width * channels), height, width, channels];
  const { probabilities } = await session.run({ images: new runtime.Tensor("uint8", pixels, shape) });
  console.log(JSON.stringify(Array.from(probabilities.data)));
}

main();
