"""Where Llama-style code and OpenCompass look for the tokenizer."""

from mixtralkit.engine.tokenizer import Tokenizer as Tokenizer
