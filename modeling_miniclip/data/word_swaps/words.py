"""English words by what they do in a caption: closed classes, common adjectives, and common verbs with their forms."""

DETERMINERS = frozenset(
    """a an the this that these those his her its my your our their some any each every another both all several
        many few no one two three four five six seven eight nine ten eleven twelve""".split()
)
# Words for an amount, which with "of" stand before a noun like a determiner: "a group of children".
AMOUNTS = frozenset(
    """group groups pair pairs couple crowd bunch lot lots number set variety series row rows line pack team
        family herd flock pile piece pieces bit plenty kind type dozen dozens hundreds""".split()
)
JOINING = frozenset("and or nor , ; / & +".split())
# Words that are neither part of a noun phrase nor relate it to another one.
OTHER_WORDS = frozenset(
    """while as when where who which what whose because if so than then there here also just only very too quite
        but not is are was were be been being am has have had do does did can could will would may might must
        should he she it they him them himself herself itself themselves i you we us me someone somebody something
        everyone everything nothing none other others together away back apart forward forwards backward backwards
        sideways upside alone ahead outdoors indoors upwards downwards to like during until about before after
        except out former latter left right ready able nearby""".split()
)

# Relations by what they mean. Those of a group may say the same: a dog "on the grass in a park" is one "in a park on
# the grass". Phrases are matched before the words in them.
RELATIONS: dict[str, str] = {
    phrase: meaning
    for meaning, phrases in {
        "place": "in|on|at|through|throughout|across|along|down|around|onto|upon|atop|inside|within|amid|among|up|"
        "inside of|in the middle of|on top of|against|toward|towards|past|over",
        "above": "above",
        "below": "below|under|beneath|underneath",
        "near": "near|by|beside|next to|close to|alongside|with|without|between|beyond|of|for|'s|outside|outside of",
        "behind": "behind",
        "in front of": "in front of",
        "into": "into",
        "from": "off|off of|out of|from|away from",
        "left of": "left of|to the left of|on the left of|on the left side of",
        "right of": "right of|to the right of|on the right of|on the right side of",
    }.items()
    for phrase in phrases.split("|")
}
_SIDES = "left right top bottom".split() + [f"{y} {x}" for y in ("top", "bottom") for x in ("left", "right")]
RELATIONS |= {
    f"{word} the {side}{part}": f"on the {side}"
    for word in ("on", "at", "in", "to")
    for side in _SIDES
    for part in ("", " side", " corner")
}
NEAR = "near"  # the meaning of relations that hold both ways, or of which this is not known
INVERSE = {"below": "above", "in front of": "behind", "right of": "left of"}
RELATION_STARTS = frozenset(phrase.split()[0] for phrase in RELATIONS)
LONGEST_RELATION = max(len(phrase.split()) for phrase in RELATIONS)

ADJECTIVES: dict[str, str] = {
    word: kind
    for kind, words in {
        "colour": """red orange yellow green blue purple violet pink brown black white grey gray tan beige gold
            golden silver maroon teal turquoise navy cream crimson magenta cyan scarlet burgundy khaki colorful
            colourful multicolored multi-colored blond blonde""",
        "size": """small large big little tiny huge giant enormous massive tall short long wide narrow thin thick
            low high deep shallow miniature medium""",
        "age": "young old older younger elderly adult teenage new ancient modern middle-aged",
        "material": """wooden metal plastic stone brick concrete cement leather denim paper cardboard glass steel
            iron rubber wicker stuffed inflatable wool silk cotton straw fur""",
        "pattern": "striped plaid checkered checked spotted dotted floral flowered patterned painted camouflage",
        "surface": """wet dry dirty clean muddy sandy snowy icy rocky grassy dusty rusty leafy wooded paved
            snow-covered frozen hairy furry fluffy shaggy curly fuzzy smooth rough""",
        "other": """bright dark pale bald bearded brunette redheaded shirtless barefoot naked hooded masked
            tattooed fat skinny muscular happy sad angry tired excited playful friendly scared funny silly serious
            hot cold warm foggy cloudy sunny rainy hilly steep empty full open closed broken fallen abandoned
            crowded busy quiet calm soft hard sharp flat round square circular rectangular triangular curved
            straight heavy light clear shiny beautiful pretty cute ugly nice fancy plain formal casual fresh
            sliced strong fast slow rural urban tropical wild electric digital homeless professional asian african
            indian chinese japanese european american mexican covered decorated""",
    }.items()
    for word in words.split()
}
SHADES = frozenset("light dark pale bright deep".split())  # with a colour they are one adjective: "pale blue"

IRREGULAR_PLURALS = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "wolves": "wolf", "leaves": "leaf", "knives": "knife", "shelves": "shelf",
    "sheep": "sheep", "police": "police",
}  # fmt: skip
# Nouns for what may be the same person, or the same animal, in two captions of an image.
SAME_THING: dict[str, str] = {
    word: name
    for name, words in {
        "person": """man woman boy girl child kid toddler baby guy lady gentleman male female adult teenager teen
            youth player rider biker cyclist skier surfer skateboarder snowboarder climber hiker runner swimmer
            worker athlete friend mother father parent son daughter brother sister couple crowd""",
        "animal": """dog cat horse bird cow goat duck monkey bear lion tiger elephant bull donkey rabbit fish puppy pup
            greyhound poodle retriever terrier shepherd""",
        "bicycle": "bike motorcycle motorbike",
        "shirt": "t-shirt top jersey sweater sweatshirt jacket coat",
        "water": "ocean sea lake river pool pond wave surf",
        "street": "road sidewalk path",
        "rock": "stone boulder cliff",
    }.items()
    for word in words.split()
}
# Nouns for the picture itself and parts of it, which are exchanged with nothing.
PICTURE_WORDS = frozenset(
    """picture photo photograph image view scene background foreground distance front side top bottom middle
        center centre edge end corner camera day night time way left right back one air part area shot closeup
        close-up""".split()
)

_VERBS = """add aim appear approach argue arrive ask attempt bark bat bathe beg bite blow board bounce bow brush
    build bump burn buy call carry carve cast catch celebrate chase cheer chew clean climb cling color come
    compete contain cook cover crash crawl cross crouch cry cuddle cut dangle dance descend dig dive do drag draw
    dress dribble drink drip drive drop eat embrace enjoy enter examine exercise face fall feed fetch fight fill
    fish flip float fly fold follow frolic gather gaze get give glide go grab grin grind grip guide hang have head
    help hide hike hit hold hop hug hula hunt hurdle include jog join juggle jump kayak keep kick kiss kneel knit
    laugh launch lay lead lean leap learn leave lick lie lift listen look lounge make march meet move nap observe
    offer open overlook paddle paint parade park participate pass pat pedal peek peer perch perform pet pick play point
    poke pose pounce pour practice prepare present pretend pull punch push put race raise reach read receive relax
    rest retrieve return ride rise roam roll row rub run rush sail say scream see sell serve shake share shoot
    shop shout shovel show sing sip sit skate ski skateboard skip sled sleep slide smile smoke sniff snowboard
    snuggle speak spin splash spray sprint squat squirt stand stare stick stop stretch stroll strike struggle surf
    surround swim swing tackle take talk taste teach tear throw tie toss touch travel trot try tug tumble turn
    twirl use utilize wade wait wake walk wander wash watch wave wear wheel wipe work wrestle write
    yawn yell""".split()
_PAST_FORMS = """ate bit blew bought brought built came caught chose cut did dove drank drew drove dug fed fell
    felt flew fought found gave given got grew held hid hung knelt laid lay led lit made met ran rode sang sat saw
    seen shot slid spoke stood stuck swam swung taken taught thrown threw told took tore went wore worn
    wrote""".split()
MUTUAL = frozenset("kiss hug embrace meet wrestle fight dance talk play race share".split())  # both do it
# Words in -ing that are nouns.
ING_NOUNS = frozenset(
    """building clothing ring string swing wing king thing railing wedding painting ceiling lightning evening
        morning spring awning opening drawing sling siding landing covering outcropping crossing sibling earring
        duckling icing stocking frosting bedding""".split()
)
# Words in -s or without ending that are far more often nouns, even if they have a verb's form.
_NOUN_FORMS = frozenset(
    """swings steps colors dress color face head water board boards wheels wheel fish paddle paddles bat bats sled
        sleds skis ski skateboard skateboards snowboard snowboards fishes paint paints heads faces wave waves row
        rows pets pet leaves leaf slide slides work hurdle hurdles pass parade drinks drink dances kayak kayaks
        bows bow tie ties sticks stick flips flip match""".split()
)


def _form(verb: str, ending: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeiou" and ending != "ing":
        return verb[:-1] + ("ies" if ending == "s" else "ied")
    if ending == "s":
        return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")
    if verb.endswith("ie") and ending == "ing":
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + ending
    short = verb[-1] not in "aeiouwxy" and verb[-2] in "aeiou" and (len(verb) < 3 or verb[-3] not in "aeiou")
    return verb + (verb[-1] if short and len(verb) < 6 else "") + ending


# Forms by how they are recognised after a noun: base forms only follow a plural ("two dogs run").
BASE_FORMS = frozenset(_VERBS) - _NOUN_FORMS
PRESENT_FORMS = frozenset(_form(verb, "s") for verb in _VERBS) - _NOUN_FORMS
PAST_FORMS = frozenset([_form(verb, "ed") for verb in _VERBS] + _PAST_FORMS) - BASE_FORMS
VERB_OF = {_form(verb, ending): verb for verb in _VERBS for ending in ("s", "ed", "ing")} | {v: v for v in _VERBS}


def kind_of_noun(noun: str) -> str:
    """Whether a singular names what is "alive", a part of the "picture" or a "thing"."""
    if SAME_THING.get(noun, noun) in ("person", "animal"):
        return "alive"
    return "picture" if noun in PICTURE_WORDS or not noun else "thing"
