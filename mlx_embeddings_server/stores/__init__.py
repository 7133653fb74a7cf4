"""Collections of documents and their vectors: each user's own, in Chroma or in Qdrant."""
