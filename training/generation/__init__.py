"""The parts of `python -m training generate`: prompts, text as it comes, conversations, output."""
