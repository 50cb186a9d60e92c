"""Texts that a language model should find likely, written for this purpose so that no model has met them.

The likelihood of plain prose is the most sensitive single number of a model's health, and the more tokens, the
more precise: `PROSE` has about 1,000, `SHORT_PROSE` is its beginning. `CODE` and `CHINESE` are for models that
learned those; they inform.
"""

from __future__ import annotations

_PARAGRAPHS = (
    """\
The harbour at Sella freezes in the second week of January, and on the first morning of the ice the ferry stops \
running and the island becomes a different place. Letters wait on the mainland. The shop sells what it has. \
People who have not spoken since the summer find themselves standing side by side at the end of the pier, \
looking at the grey line where the open water used to be, and because there is nothing else to do they begin to \
talk. My grandmother called it the month of honest neighbours. She said that a village only knows itself when \
nobody can leave.""",
    """\
I was nine years old when I first measured the ice for the harbour master. He gave me a hand drill, a wooden rule \
with brass ends, and a notebook whose pages were ruled in blue. Every morning before school I walked out along \
the line of stakes, drilled a hole beside each one, hooked the rule under the edge, and wrote down the number. \
Eleven stakes, eleven numbers. When the smallest of them reached thirty centimetres he would hang a red flag from \
the crane, and that meant a horse could cross. At forty-five he hung a black one, and then the trucks came.""",
    """\
What I learned from the notebook was not how thick the ice was but how little one number says. The third stake \
always gave less than its neighbours, because a stream entered the bay there and the water moved beneath it. The \
ninth stake gave more, since it stood in the shadow of the cliff. If you took the average of all eleven you got a \
value that was true of no place in the whole bay, and it would have drowned the first driver who trusted it. The \
harbour master never used the average. He read down the column with his finger, found the smallest number, and \
asked me whether I had drilled that hole myself.""",
    """\
Years later I worked in a laboratory where we tested steel for bridges. A sample is pulled until it breaks, and a \
machine draws a curve that shows how far it stretched at every moment. For most of the test the line is straight, \
because the metal gives way in proportion to the force, and if you let go it returns to its old length as though \
nothing had happened. Then the line bends. From that point on the change is permanent, and what interested us was \
where exactly the bend began. The instruments were far better than my wooden rule. They reported six digits, of \
which the last three were noise, and the young engineers wrote all six into their reports.""",
    """\
One winter a batch of samples broke too early. The supplier said that our machine was at fault, and we said that \
their steel was. Both sides had numbers. For two weeks people exchanged long letters full of averages, and nobody \
was convinced, since each of us could explain the difference by doubting the other. In the end a technician named \
Ruth took one of the broken samples, cut it in half, and sent the halves to two other laboratories without saying \
where they came from. Both found what we had found. Then she took a sample of good steel from the year before, put \
it into our machine, and it broke exactly where it should. It was not the machine, and now everybody could see it.""",
    """\
I have thought about that often. She did not measure anything more precisely than we had. She changed one thing \
at a time and kept the rest as it was, so that whatever changed in the result could have only one cause. When you \
do not know whether the fault is in the steel, in the machine or in the person who reads the dial, a better dial \
does not help you. You have to exchange the steel, then the machine, then the person, and watch which exchange \
makes the trouble go away. It is slow and it is dull, and it ends arguments.""",
    """\
The ferry has a stronger engine today, and the harbour at Sella has not been closed for more than a few days since \
I was a young man. The notebooks are in a drawer in the office, forty of them, tied together with string. Last \
autumn I went through them with a student who wanted to know how the climate of the bay had changed. She asked \
which of the stakes she should use. I told her to use all of them, to draw eleven lines instead of one, and to \
begin with the third, where the water moves. She laughed, but she did it, and the first thing that she noticed was \
that in the spring of my tenth year the third line stops for a week and then continues one centimetre lower than \
before. I remembered it at once. The drill had slipped, the brass end of the rule had broken off, and I had been \
too ashamed to say so.""",
)

PROSE = "\n\n".join(_PARAGRAPHS) + "\n"
SHORT_PROSE = "\n\n".join(_PARAGRAPHS[:2]) + "\n"

CODE = '''\
from collections import Counter
from pathlib import Path


def count_words(path: Path, minimum_length: int = 3) -> Counter[str]:
    """Count how often each word occurs in a text file, ignoring case and short words."""
    counts: Counter[str] = Counter()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            words = line.lower().split()
            counts.update(word for word in words if len(word) >= minimum_length)
    return counts


def print_most_common(counts: Counter[str], limit: int = 10) -> None:
    """Print the most common words, one per line, with their counts aligned on the right."""
    width = max((len(word) for word in counts), default=0)
    for word, count in counts.most_common(limit):
        print(f"{word:<{width}} {count:>6}")


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 2:
        sys.exit("usage: python count_words.py FILE")
    print_most_common(count_words(Path(sys.argv[1])))
'''

CHINESE = """\
小时候我住在海边的一个村子里。每年冬天，港口都会结冰，渡船停开，村里的人就没有办法出去了。大人们说，冰厚三十厘米的时候，马车可以过去；\
冰厚四十五厘米的时候，卡车也可以过去。所以每天早上上学以前，我都要到冰上去量一量。我在十一个地方打洞，把尺子放下去，然后把数字写在本子上。

后来我发现，有一个地方的冰总是比别的地方薄，因为那里有一条小河流进海里，冰下面的水一直在动。如果只看平均数，就看不出这个危险。\
港口的老师傅从来不看平均数，他只看最小的那个数字，然后问我：“这个洞是你自己打的吗？”多年以后，我在实验室里工作，还常常想起他的这句话。
"""

#: who, and what is said: for models that know a chat template and little else, as the bundled one does
CONVERSATION = (
    ("user", "Write a haiku about autumn leaves"),
    ("assistant", "a bell far away —\nautumn leaves float by the pond\nwaiting for the moon"),
    ("user", "Write a haiku about the snow"),
    ("assistant", "a door left open —\nthe snow gathers on the bench\nas the night comes on"),
    ("user", "Write a haiku about a river"),
    ("assistant", "an empty teahouse —\na river whispers in peace\nwhile my tea grows cold"),
    ("user", "Write a haiku about an old pond"),
    ("assistant", "an old pond glitters\nand the misty bay listens —\nthe sound of water"),
    ("user", "Write a haiku about the spring wind"),
    ("assistant", "the forgotten gate —\nthe spring window lies at ease\nwhile I drink my tea"),
)
