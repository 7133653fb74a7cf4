// Hybrid search with nothing but fetch: dense and sparse vectors find candidates, a reranker puts them in order.
//
//   node fetch.js DENSE SPARSE RERANKER "When does the boat sail?"      (served names)
//
// URL and key are taken from the environment: EMBEDDINGS_URL (http://localhost:8888/v1), EMBEDDINGS_API_KEY.

import { readFile } from "node:fs/promises";

const url = process.env.EMBEDDINGS_URL ?? "http://localhost:8888/v1";
const key = process.env.EMBEDDINGS_API_KEY ?? "none";
const candidates = 10;
const rankConstant = 60; // of reciprocal rank fusion (Cormack, Clarke and Büttcher, 2009)

async function post(route, body) {
  const reply = await fetch(`${url}/${route}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${key}` },
    body: JSON.stringify(body),
  });
  const content = await reply.json();
  if (!reply.ok) throw new Error(`${route}: ${reply.status}: ${content.error.message}`);
  return content;
}

async function embed(route, model, input, inputType) {
  const reply = await post(route, { model, input, input_type: inputType, truncate: "end" });
  return reply.data.map((item) => item.embedding);
}

function cosine(a, b) {
  const dot = (x, y) => x.reduce((sum, value, place) => sum + value * y[place], 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
}

function sparseProduct(a, b) {
  const values = new Map(b.indices.map((index, place) => [index, b.values[place]]));
  return a.indices.reduce((sum, index, place) => sum + a.values[place] * (values.get(index) ?? 0), 0);
}

/** Places of the documents, the best first. */
function ranked(scores) {
  return [...scores.keys()].sort((a, b) => scores[b] - scores[a]);
}

/** Reciprocal rank fusion of several rankings. */
function fused(rankings) {
  const scores = new Map();
  for (const ranking of rankings) {
    ranking.slice(0, candidates).forEach((document, rank) => {
      scores.set(document, (scores.get(document) ?? 0) + 1 / (rankConstant + rank + 1));
    });
  }
  return [...scores.keys()].sort((a, b) => scores.get(b) - scores.get(a)).slice(0, candidates);
}

const [dense, sparse, reranker, query] = process.argv.slice(2);
if (query === undefined) {
  console.error('usage: node fetch.js DENSE SPARSE RERANKER "a question"');
  process.exit(2);
}

const lines = (await readFile(new URL("../town_notices.jsonl", import.meta.url), "utf8")).trim().split("\n");
const documents = lines.map((line) => JSON.parse(line)).map((notice) => `${notice.title}: ${notice.text}`);

const [denseDocuments, sparseDocuments, [denseQuery], [sparseQuery]] = await Promise.all([
  embed("embeddings", dense, documents, "document"),
  embed("embed_sparse", sparse, documents, "document"),
  embed("embeddings", dense, [query], "query"),
  embed("embed_sparse", sparse, [query], "query"),
]);
const found = fused([
  ranked(denseDocuments.map((vector) => cosine(denseQuery, vector))),
  ranked(sparseDocuments.map((vector) => sparseProduct(sparseQuery, vector))),
]);
const { results } = await post("rerank", {
  model: reranker,
  query,
  documents: found.map((place) => documents[place]),
  top_n: 3,
  truncate: "end",
});
for (const { index, relevance_score: score } of results) {
  console.log(`${score.toFixed(4)}  ${documents[found[index]]}`);
}
