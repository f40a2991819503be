"""The texts that the demo offers: prose, verse, a technical text, and symbols."""

EXAMPLES = {
    "verse": (
        "Tomorrow, and tomorrow, and tomorrow,\nCreeps in this petty pace from day to day,\n"
        "To the last syllable of recorded time."
    ),
    "news": (
        "The council voted on Tuesday to rebuild the harbour wall, although most of its members had called the plan "
        "too expensive only a year before."
    ),
    "technical": (
        "A discrete cosine transform turns the channels of one token into frequencies; the entropy of their power says "
        "how evenly it is spread."
    ),
    "story": (
        "Nobody in the village remembered who had planted the pear tree, but every autumn the same old woman came down "
        "the hill and counted its fruit."
    ),
    "symbols": "[MAX 4 [MIN 7 2 9 ] [SM 5 8 1 ] 3 ] = 4; f(x) = 3*x**2 - 12.5 if x >= 0 else None",
}
"""Title of each example and its text."""
