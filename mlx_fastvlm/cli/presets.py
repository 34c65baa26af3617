"""Questions that need not be typed."""

DEFAULT_PROMPT = "Describe the image."
PRESETS = {  # the questions of Apple's demo app
    "describe": "Describe the image in English. Output should be brief, about 15 words or less.",
    "expression": "What is this person's facial expression? Output only one or two words.",
    "read": "What is written in this image? Output only the text in the image.",
}
