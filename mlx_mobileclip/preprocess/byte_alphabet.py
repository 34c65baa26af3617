"""GPT-2's alphabet for bytes, in which the vocabularies of CLIP and Qwen2 are written.

Source: openai/gpt-2 `src/encoder.py` bytes_to_unicode.
"""


def byte_alphabet() -> dict[str, int]:
    """Map characters to bytes: visible Latin-1 to itself, U+0100 and up to the other bytes.

    In the order of CLIP's first 256 ids.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}
