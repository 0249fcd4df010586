"""Networks: their facts, their parts, and how plugins act inside of them."""

from suite.network.facts import BlockRef as BlockRef
from suite.network.facts import Layout as Layout
from suite.network.facts import Network as Network
