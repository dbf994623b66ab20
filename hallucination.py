"""Which texts of an LLM are of its own making: refusals, loops, text for silence, more than one can say."""

import re
from itertools import groupby, pairwise

# Thai to Burmese, Khmer, kana, Chinese
UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
REFUSAL = re.compile(  # in lower case, without apostrophes, punctuation as a space
    r"(?:\b(?:as|im|i am) an ai\b"
    r"|\b(?:sorry|apologi[sz]e)\b.{0,60}\b"
    r"(?:transcri|speech|audio|recording|assist|help with|request|understand|provide|confusion)"
    r"|\b(?:no|any|can ?not|cant|could not|(?:un|not )able to|provide|speech)\b.{0,30}\b(?:transcri|audio\b)"
    r"|\bplease provide\b.{0,30}\b(?:speech|recording)|^(?:there is )?no speech(?: detected| provided)?$"
    r"|(?:抱歉|对不起).{0,10}(?:无法|不能|没有|听不).{0,10}(?:转录|转写|识别|语音|音频|录音|听|理解|提供|回答)"
    r"|(?:无法|不能|没有|请提供).{0,6}(?:转录|转写|语音|音频|录音)"
    r"|作为(?:一个|一名)? ?(?:ai|人工智能)(?:语言)?(?:模型|助手)).{0,40}"
)


def words_of(text: str) -> list[str]:
    """Words (of unspaced scripts: characters) without case and punctuation; punctuation, if that is all."""
    return WORD.findall(re.sub("['’]", "", text.casefold())) or list(text.replace(" ", ""))


def looped(text: str) -> int:
    """How many words in a row repeat what is just before them, where that is said three times or more."""
    words, longest = words_of(text), 0
    for period in range(1, min(len(words) // 3, 50) + 1):
        repeats = groupby(a == b for a, b in zip(words, words[period:]))
        run = max((len(list(group)) for same, group in repeats if same), default=0)
        longest = max(longest, run if run >= 2 * period else 0)
    return longest


def refuses(ref: str, hyp: str) -> bool:
    """Whether it speaks as an assistant, in words that are not in the reference; see `hallucination`."""
    said = " ".join(re.findall(r"\w+", re.sub("['’]", "", hyp.casefold())))
    heard = set(pairwise(words_of(ref)))
    for refusal in REFUSAL.finditer(said):
        neighbours = list(pairwise(words_of(refusal[0])))
        if sum(pair in heard for pair in neighbours) < len(neighbours) / 2:
            return True
    return False


def hallucination(ref: str, hyp: str, seconds: float | None = None) -> str | None:
    """The kind of hallucination, text of the LLM's own making; None for what is right or merely wrong.

    refusal: it speaks as an assistant ("I apologize, but there is no speech to transcribe"), and of the pairs
        of neighbouring words in that, less than half are in the reference too.
    loop: what is said three times over or more makes 6 words (in unspaced scripts: characters) of mere
        repetition, on top of twice what there is of that in the reference.
    silence: there is text, and the reference is empty.
    too long: over 30 letters a second and 20 besides, and over twice the reference. A Chinese character is 3.

    The first that holds. The texts are those before any normalizer; seconds are those of the audio, if known.
    """
    if refuses(ref, hyp):
        return "refusal"
    if looped(hyp) >= 2 * looped(ref) + 6:
        return "loop"
    if not ref.strip() and re.search(r"\w", hyp):
        return "silence"
    ref_len, hyp_len = (len(re.sub("[\u3400-\u9fff]", "abc", text).replace(" ", "")) for text in (ref, hyp))
    if seconds is not None and hyp_len > max(30 * seconds + 20, 2 * ref_len):
        return "too long"
    return None
