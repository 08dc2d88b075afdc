"""Documents and questions in: loaders, chunker, question sets, the sample handbook."""
