"""GGUF files as llama.cpp loads them: names, hyper-parameters, tokenizer and types of tensors."""
