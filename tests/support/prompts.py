"""Fifty prompts of different kinds and lengths for equality tests."""

_SUBJECTS = ["the sea", "a small dog", "gravity", "prime numbers", "the city of Rome", "bread", "Python code", "rain",
             "an old clock", "the moon"]  # fmt: skip
_FORMS = [
    "Once upon a time there was {}, and",
    "<|im_start|>user\nTell me about {}.<|im_end|>\n<|im_start|>assistant\n",
    "Q: What is interesting about {}?\nA:",
    "A list of ten facts about {}:\n1.",
    "The following is a long and detailed article. Its subject is {}. It was written for children who like to read "
    "and ask many questions, and it explains every word that is not easy. " * 2 + "It begins:",
]
PROMPTS = [form.replace("{}", subject) for form in _FORMS for subject in _SUBJECTS]
