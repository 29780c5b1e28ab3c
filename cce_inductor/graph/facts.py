"""What may be known of an op whatever it is given."""

import enum


class Fact(enum.Flag):
    """What is known of an op whatever it is given. `SPELLINGS` has it beside the name; nothing else lists names."""

    PURE = enum.auto()  # a view or exact arithmetic, of its arguments alone: it may be computed earlier (`hoist`)
    VIEW = enum.auto()  # the result may lie in the memory of its first argument
    IN_ORDER = enum.auto()  # all entries of its first argument, in their order
    EACH_ONCE = enum.auto()  # no entry of its first argument twice
    REPEATS = enum.auto()  # the same entries again, along new dimensions or old ones
    HANDS_ON = enum.auto()  # entries of its first argument, as they are but for a cast
    ENTRYWISE = enum.auto()  # every entry from those at the same place
    ANY_PLACE = enum.auto()  # the logits may be any of its arguments, not only the first
    IN_PLACE = enum.auto()  # with an underscore, as an operator or by nature it writes into its first argument
    OF_SQUARES = enum.auto()  # it takes squares of the logits, on the way to a softcap
    CONSTANT = enum.auto()  # a new tensor full of one number
    METADATA = enum.auto()  # it reads no entry of its first argument, but its shape or dtype
    NORMALISES = enum.auto()  # it sums over all classes: a softmax, its logarithm, a log-sum-exp
    PICKS = enum.auto()  # it takes entries of some classes out of each row
    LOSS = enum.auto()  # a loss over classes


NOTHING = Fact(0)
ROWS = Fact.PURE | Fact.HANDS_ON | Fact.EACH_ONCE
VIEW = ROWS | Fact.VIEW
RESHAPE = VIEW | Fact.IN_ORDER
EXPAND = (VIEW & ~Fact.EACH_ONCE) | Fact.REPEATS
EXACT = Fact.PURE | Fact.ENTRYWISE
EDIT = EXACT | Fact.IN_PLACE
SHARED = EXACT | Fact.VIEW | Fact.HANDS_ON
INTO = Fact.IN_PLACE | Fact.ENTRYWISE
