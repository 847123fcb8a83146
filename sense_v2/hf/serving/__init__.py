"""Running models: Qwen4-Exp with its table left on disk, and OpenAI's API."""
