"""Defaults that the Python API and the command line share; imports nothing."""

DEFAULT_MODEL = "apple/FastVLM-0.5B"
DEFAULT_MAX_TOKENS = 256
DEFAULT_PROMPT = "Describe the image."
PRESETS = {  # the questions of Apple's demo app
    "describe": "Describe the image in English. Output should be brief, about 15 words or less.",
    "expression": "What is this person's facial expression? Output only one or two words.",
    "read": "What is written in this image? Output only the text in the image.",
}
