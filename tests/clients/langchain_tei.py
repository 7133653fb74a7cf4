# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "langchain-huggingface==1.2.1", # the last that takes a URL: from 1.2.2 on it refuses all but names of the hub
#     "numpy", # huggingface-hub reads vectors with it, and does not ask for it
# ]
# ///
"""Embed texts with LangChain's client of TEI: `uv run --script tests/clients/langchain_tei.py URL TEXT...`

It prints `{"documents": [...], "query": [...], "awaited": [...]}`: the texts' vectors, that of the first text as a
query, and the texts' vectors again by the client's async half.

An environment of its own, locked beside it: langchain-huggingface takes huggingface-hub below 2, the server 2 or later.
"""

import argparse
import asyncio
import json

from langchain_huggingface import HuggingFaceEndpointEmbeddings  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    arguments = parser.parse_args()
    embeddings = HuggingFaceEndpointEmbeddings(model=arguments.url)
    vectors = {
        "documents": embeddings.embed_documents(arguments.texts),
        "query": embeddings.embed_query(arguments.texts[0]),
        "awaited": asyncio.run(embeddings.aembed_documents(arguments.texts)),
    }
    print(json.dumps(vectors))


if __name__ == "__main__":
    main()
