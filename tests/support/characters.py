"""The regular expression of SGLang's first measurements (arXiv 2312.07104 and its repository), with ASCII words."""

WORDS = "[a-zA-Z0-9_ ]{1,16}"
CHARACTER = (
    r"\{\n"
    rf'    "name": "{WORDS}",\n'
    r'    "house": "(Gryffindor|Slytherin|Ravenclaw|Hufflepuff)",\n'
    r'    "blood status": "(Pure-blood|Half-blood|Muggle-born)",\n'
    r'    "occupation": "(student|teacher|auror|ministry of magic|death eater|order of the phoenix)",\n'
    r'    "wand": \{\n'
    rf'        "wood": "{WORDS}",\n'
    rf'        "core": "{WORDS}",\n'
    r'        "length": [0-9]{1,2}\.[0-9]{0,2}\n'
    r"    \},\n"
    r'    "alive": "(Alive|Deceased)",\n'
    rf'    "patronus": "{WORDS}",\n'
    rf'    "bogart": "{WORDS}"\n'
    r"\}"
)
