"""The engine process: llama.cpp over one GGUF, in a child that speaks Ollama's wire on loopback."""
