"""Difficult texts for tokenizers: 22 languages, code, numbers, emoji, runs of white space."""

from collections.abc import Iterable

LANGUAGES = (
    "The quick brown fox jumps over the lazy dog; it's 3 o'clock, isn't it? I'LL say: don't!",
    "Der Bär läuft über die große Straße – schön, oder? Größenwahn kostet 1.299,50 €.",
    "L'été dernier, où étiez-vous ? Ça coûte 12 € à l'hôtel « Chez Noël ».",
    "El niño comió piñas y bebió agua; ¿verdad? ¡Claro que sí, mañana!",
    "A ação não começou às três; avó e avô estão aí, coração.",
    "Perché no? La città è già più bella, così si può.",
    "Zażółć gęślą jaźń, proszę bardzo: Łódź, Kraków i Świnoujście.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul'da ığdır.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Щастя не в грошах; їжак і ґанок під'їхали о 7:30.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία: γιατί όχι;",
    "שלום עולם, מה שלומך היום? בְּרֵאשִׁית בָּרָא",
    "مرحبا بالعالم، كيف حالك اليوم؟ السَّلامُ عليكم ١٢٣",
    "نیم‌فاصله را می‌نویسیم؛ خانه‌ها زیباست ۴۵۶",
    "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय ज्ञान १२३",
    "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।",
    "வணக்கம் உலகம், எப்படி இருக்கிறீர்கள்?",
    "สวัสดีชาวโลก วันนี้เป็นอย่างไรบ้าง ๑๒๓",
    "Xin chào thế giới, hôm nay bạn thế nào? Đường phố đẹp quá.",
    "你好,世界!今天天气怎么样?我想买3本书。",
    "こんにちは世界。今日はいい天気ですね!カタカナとひらがな",
    "안녕하세요 세계! 오늘 날씨가 어때요? 한국어 123",
    "Nǐ hǎo; Tiếng; Ünïcödé é (composed) é (combining) ﬁ ligature ﷺ",
)
OTHERS = (
    "def add(a, b):\n    return a + b\n\n\nif __name__ == '__main__':\n\tprint(add(1, 2))  # 3\n",
    'for (int i = 0; i < 10; ++i) { printf("%d\\n", arr[i]->x * 0xFF); } /* end */',
    '{"name": "Ana", "tags": ["a", "b"], "n": -1.5e-10, "ok": null}',
    "SELECT COUNT(*) FROM users WHERE age >= 21 AND name LIKE '%o''b%';",
    "<div class=\"x\">&amp; <b>bold</b></div>\r\n<!-- note -->\r\n",
    "https://example.org/a/b?c=d&e=%20f#g  me@example.org  C:\\Users\\x",
    "0 1 12 123 1234 12345 1,234,567.89 3.14159 1e9 ½ ² ① 七",
    "😀 😁👍🏽 👨‍👩‍👧‍👦 🇫🇷🇩🇪 🏳️‍🌈 ❤️ ✨🚀 ☃ ⌘",
    " leading", "trailing ", "  two  spaces  ", "   ", "\t", "\t\ttabs\t", "\n", "\n\n\n", " \n ", "a\n\nb\n \nc",
    "x" * 60, "aaaaaaaaaa bbbbbbbbbb", "!!!???...---===***", "$%^&*()_+{}[]|\\:;\"'<>,./?~`",
    "'s 't 're 've 'm 'll 'd 'S 'T I'm you'Re", "a\u00a0b\u2003c\u200bd\ufeffe", "\x01\x02\x7f", "𝕳𝖊𝖑𝖑𝖔 𠜎 𒀀 🜁",
    "                                        deep", "a" + " " * 33 + "b", "tab\there  and\t two", "line\r\nfeeds\rhere",
)  # fmt: skip


def battery(special_tokens: Iterable[str] = ()) -> list[str]:
    """Return more than 500 distinct texts, some of them with the given special tokens."""
    texts = [*LANGUAGES, *OTHERS]
    for text in (*LANGUAGES, *OTHERS):
        texts += [text.upper(), text + "\n", " " + text, "\n\n" + text, text[::-1], text[: len(text) // 2]]
        texts += text.split(" ")[:4]
        texts.append(f"{text}  {LANGUAGES[len(texts) % len(LANGUAGES)]}")
    for number, token in enumerate(special_tokens):
        text = LANGUAGES[number % len(LANGUAGES)]
        texts += [
            token,
            f"{token}{text}",
            f"{text}{token}",
            f"{token}\n{text}{token}\n",
            f"{text} {token} {text}",
        ]
    return [text for text in dict.fromkeys(texts) if text]
