"""The colours of pictures and screens: Okabe and Ito's (2008), which colour-blind readers can tell apart."""

from __future__ import annotations

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#8A8F98"
STAGE_COLOURS = {
    "GERMINATED": GREY,
    "TRAINING": SKY,
    "GRAFTING": ORANGE,
    "STABILISING": YELLOW,
    "EVALUATING": PURPLE,
    "FOSSILISED": GREEN,
    "CULLED": VERMILION,
    "EMBARGOED": "#B9BDC4",
    "ERROR": "#7A1F1F",
    "ROLLED_BACK": "#5C4033",
}
