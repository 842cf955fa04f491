"""What leaves the package: embeddings in tables, encoders as programs, and the index that searches embeddings."""
