"""The built-in haystack: plain English sentences, generated from a seed, none of them twice, no digits."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator

# one kind of word per entry, "kind: choice | choice"; no quality begins with a vowel, so that "a" is right before it
_TEXT = """
person: the baker | the old sailor | the schoolteacher | the night watchman | the beekeeper | the postwoman |
  the young carpenter | the librarian | the ferryman | the widow from the mill | the stationmaster | the apprentice |
  the glassblower | the retired judge | the choir leader | the gardener | the clockmaker | the fisherman's daughter |
  the innkeeper | the surveyor | the translator | the piano tuner | the shepherd | the printer's son
place: the harbour | the market square | the upper meadow | the river bend | the old granary | the lighthouse |
  the town hall | the railway bridge | the orchard | the quarry | the chapel hill | the customs house | the boatyard |
  the walled garden | the reading room | the watermill | the northern gate | the drying lofts | the brewery yard |
  the salt marsh | the tannery lane | the observatory | the cattle fair | the east pier
thing: a brass lantern | a basket of plums | a roll of sailcloth | a wooden chest | a bundle of letters |
  a copper kettle | a cracked bell | a sack of barley | a map without names | a pair of oars | a box of nails |
  a jar of honey | a painted sign | a folding ladder | a coil of rope | a stack of ledgers | a silver thimble |
  a broken barometer | a wheel of cheese | a tin of varnish | a mended net | a crate of oranges | a stone weight |
  a feather pillow
quality: quiet | patient | crooked | generous | weathered | narrow | cheerful | stubborn | pale | sturdy | curious |
  careful | faded | restless | gentle | heavy | hollow | modest | mossy | bright | dusty | solemn | slender | rough
weather: a thin fog | the first snow | a warm wind | steady rain | the summer heat | a late frost | low cloud |
  a clear evening | the spring tide | a sudden hailstorm | the autumn light | a long drought | morning dew |
  a distant thunderstorm | the equinox gale | a week of drizzle | a mild afternoon | the harvest moon | a grey dawn |
  the sea breeze
time: before breakfast | after the fair | late in the week | on the shortest day | towards evening |
  at the end of the season | during the holidays | early in the spring | once the shops had closed |
  between two storms | when the bells rang | on market day | long before the road was built | in the second year |
  around noon | after the harvest | as the lamps were lit | near midnight | while the town slept |
  by the time the ferry came
did: repaired | carried | sketched | borrowed | polished | buried | measured | traded | weighed | lost | found |
  described | inherited | sold | inspected | wrapped | delivered | guarded | unpacked | counted | labelled | raised |
  cleaned | remembered
feeling: without a word of complaint | with great care | as if nothing had happened | to everyone's surprise |
  for no particular reason | with a tired smile | against all advice | in perfect silence | more slowly than usual |
  humming an old tune | with both hands | half in jest | as was the custom | under a borrowed umbrella |
  with some reluctance | in the best of spirits | out of simple habit | with the door left open
subject: the price of timber | the new canal | the missing key | the choir's next concert |
  the colour of the shutters | the repair of the roof | the spelling of a street name | the depth of the well |
  the habits of swallows | the strength of the ice | the visit of the inspector | the recipe for dark bread |
  the width of the bridge | the taste of the water | the age of the elm | the route of the mail coach |
  the sale of the lower field | the tuning of the organ | the shape of the dunes | the fate of the old theatre
adjective: amber | brisk | civil | dapper | eager | fabled | gleaming | hasty | ideal | jolly | keen | lucid | mellow |
  nimble | oaken | plucky | quaint | rustic | silken | tidy | urban | velvet | wistful | zesty | blazing | coastal |
  drowsy | elated | frosty | glossy | humble | lively | magenta | ornate | placid | regal
noun: anchor | basin | candle | dynamo | ember | falcon | gallery | hammock | island | jacket | kernel | lagoon |
  meteor | nutmeg | obelisk | pebble | quiver | raven | saddle | tunnel | urchin | violin | walnut | yarrow | zephyr |
  badger | cobalt | driftwood | engine | fountain
"""

_WORDS: dict[str, tuple[str, ...]] = {
    kind: tuple(word.strip() for word in words.split("|"))
    for kind, words in re.findall(r"^(\w+): (.*(?:\n  .*)*)", _TEXT, re.M)
}

_TEMPLATES = tuple(
    """{time}, {person} {did} {thing} near {place}, {feeling}.
{person} and {person2} talked about {subject} until {weather} drove them away from {place}.
nobody at {place} could say why {person} had {did} {thing} {time}.
{weather} settled over {place}, and {person} {did} {thing} {feeling}.
it was {quality} work, but {person} liked it better than arguing about {subject}.
the walls of {place} looked {quality} and {quality2} {time}.
{person} kept {thing} in a {quality} room behind {place}.
{feeling}, {person} told {person2} everything about {subject}.
there is a {quality} path from {place} to {place2}, and {person} knows every stone of it.
because of {weather}, the meeting about {subject} was moved to {place}.
{person} had once {did} {thing} for {person2}, and neither of them forgot it.
a {quality} smell of smoke and apples drifted from {place} {time}.
when {person} came back from {place}, {thing} was still there, looking {quality} in the light.
some said that {subject} mattered more than {subject2}, and {person} agreed {feeling}.
{time}, {weather} reached {place} and stayed for a {quality} while.
in the notebook of {person} there is a {quality} drawing of {thing} beside {place}.
{person2} laughed, since {person} had {did} {thing} twice and {thing2} never.
between {place} and {place2} the ground is {quality}, especially after {weather}.
the story of how {person} {did} {thing} is told at {place} {time}.
{person} would rather speak of {subject} than of {thing} {time}.
behind {place} stood {thing}, {quality} and almost forgotten.
{weather} made the road to {place} {quality}, so {person} stayed with {person2}.
{time} a letter about {subject} arrived, which {person} {did} {feeling}.
children from {place} believed that {person} owned {thing} and {thing2}.
if {weather} lasts, {person} will bring {thing} to {place}, as agreed with {person2}.
the {quality} voice of {person} carried as far as {place2} {time}.
no account of {place} leaves out {subject}, though {person} skipped it {feeling}.
{thing} hung above the door of {place}, {quality} from years of {weather}.""".splitlines()
)


def sentences(seed: int | str) -> Iterator[str]:
    """English-like sentences without end, the same for the same seed, none twice."""
    rng = random.Random(f"filler:{seed}")
    seen: set[str] = set()
    while True:
        template = rng.choice(_TEMPLATES)
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}
        words: dict[str, str] = {}
        for name in sorted(fields):
            kind = name.rstrip("2")
            # "person2" must differ from "person"
            words[name] = rng.choice([w for w in _WORDS[kind] if w != words.get(kind)])
        sentence = template.format(**words)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence[0].upper() + sentence[1:]


def key(rng: random.Random) -> str:
    """A name for a needle: adjective-noun, 1,080 of them."""
    return "-".join(rng.choice(_WORDS[kind]) for kind in ("adjective", "noun"))
