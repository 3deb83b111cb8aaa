"""Finding passages: words, BM25, fusion of legs, reranking, diversity. Pure NumPy."""
