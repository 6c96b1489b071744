"""Which language a text is probably written in, by its script and its most frequent words.

A coarse measure for whole data sets: a text counts for a language if at least three of its first words are among that
language's frequent ones (two in a text of fewer than twelve words), and more than for any other language. Languages
with a script of their own are told by it.
"""

from __future__ import annotations

import re

from qadapter.preferences.scripts import main_script

_FREQUENT = {
    "English": "the of and to in is that it for you was with on as are be this have from or not by at but an your",
    "German": "der die und das ist nicht ein eine zu mit den von sich auf für dem des im auch es als werden sie",
    "French": "le la les des est et que une pour dans qui pas sur du plus au ce avec sont par vous il elle cette aux",
    "Spanish": "el los las que del por con una para es su al lo como más pero sus muy este también puede está son y",
    "Italian": "il di che non per una sono con del della gli è dei più anche nel alla questo come ma ho essere delle e",
    "Portuguese": "o os as que não uma para com do da dos em mais como mas ao pelo você são também isso está ou é",
    "Dutch": "het een van en is dat niet te zijn voor met op aan er ook maar als bij of uit wordt je naar deze kan",
    "Swedish": "och att det som en är på för med av den till inte har ett om kan de man jag från så eller när",
    "Danish": "og at det som en er på for med af den til ikke har et om kan de man jeg fra så eller når være",
    "Polish": "i w nie na się z do że to jest jak po za co od ale przez są dla czy może tak lub jego być",
    "Czech": "a se na je že to v s z do jako pro ale jsem by které nebo jsou tak při být podle který i od",
    "Turkish": "ve bir bu için ile da de çok olarak daha en gibi olan ne kadar sonra var değil ama her şey ya bunu ki",
    "Indonesian": "yang dan di untuk dengan ini itu dari tidak dalam pada adalah ke akan juga atau anda saya",
    "Vietnamese": "và của là có không được cho một các với trong người này những đã để khi từ như bạn thể cũng về",
    "Finnish": "ja on ei se että oli hän mutta ovat kun myös voi joka tai niin sen kuin jos olla ole mitä siitä",
    "Romanian": "și în de la cu nu este pe care să din pentru mai sau că un o au fi prin sunt dar acest ca",
    "Hungarian": "a az és hogy nem is egy van meg ez de csak már vagy mint el ha volt azt lehet kell fel le",
    "Russian": "и в не на что с по это как его но из к у за от для о так же все вы или быть если",
    "Ukrainian": "і в не на що з та до це як за від для у але його є про або які був також бути під між",
    "Bulgarian": "и на да се за в от не с е по че са като или може това до но тази при към със има ще",
}
_OF_WORD: dict[str, list[str]] = {}
for _language, _words in _FREQUENT.items():
    for _word in _words.split():
        _OF_WORD.setdefault(_word, []).append(_language)
_OF_SCRIPT = {
    "Greek": "Greek",
    "Hebrew": "Hebrew",
    "Thai": "Thai",
    "Hangul": "Korean",
    "Japanese": "Japanese",
    "Han": "Chinese",
}
_MOST_CHARACTERS = 1000
_WORD = re.compile(r"[^\W\d_]+")

UNCLEAR = "unclear"


def main_language(text: str) -> str:
    """The language of a text's first 1,000 characters, such as `German`; `unclear` where too little speaks for one."""
    start = text[:_MOST_CHARACTERS]
    script = main_script(start)
    if script not in ("Latin", "Cyrillic"):
        return _OF_SCRIPT.get(script, UNCLEAR)
    counts: dict[str, int] = {}
    words = _WORD.findall(start.lower())
    for word in words:
        for language in _OF_WORD.get(word, ()):
            counts[language] = counts.get(language, 0) + 1
    best, *others = sorted(counts.items(), key=lambda item: -item[1])[:2] or [(UNCLEAR, 0)]
    least = 2 if len(words) < 12 else 3
    return best[0] if best[1] >= least and not (others and others[0][1] == best[1]) else UNCLEAR
