// The official client: npm install, then
//
//   node openai.js MODEL "One text." "Another text."      (served name)
//
// URL and key are taken from the environment: EMBEDDINGS_URL (http://localhost:8888/v1), EMBEDDINGS_API_KEY.

import OpenAI from "openai";

const [model, ...texts] = process.argv.slice(2);
if (texts.length === 0) {
  console.error('usage: node openai.js MODEL "a text" ...');
  process.exit(2);
}

const client = new OpenAI({
  baseURL: process.env.EMBEDDINGS_URL ?? "http://localhost:8888/v1",
  apiKey: process.env.EMBEDDINGS_API_KEY ?? "none",
});

// It asks for base64 and gives numbers. Fields beyond OpenAI's, such as input_type, go beside the others.
const { data, usage } = await client.embeddings.create({ model, input: texts });
const vectors = data.map((item) => item.embedding);
console.log(`${model}: ${vectors[0].length} dimensions, ${usage.prompt_tokens} tokens`);

const dot = (a, b) => a.reduce((sum, value, place) => sum + value * b[place], 0);
for (const [place, text] of texts.entries()) {
  const row = vectors.map((other) => (dot(vectors[place], other) / Math.sqrt(dot(vectors[place], vectors[place]) * dot(other, other))).toFixed(3));
  console.log(`${row.join("  ")}  ${text}`);
}
