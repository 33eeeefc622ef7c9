"""The sections of the page, one function a kind of result: a plain sentence, the picture, its caption, its table."""

from collections.abc import Callable, Mapping, Sequence
from inspect import getdoc

from kvfold.report.groups import Group
from kvfold.report.markup import Markup, join, tag
from kvfold.report.numbers import MISSING, count, percent
from kvfold.report.passkeys import passkey_part
from kvfold.report.pictures.decode import decode_picture
from kvfold.report.pictures.kept import HeadMap, head_map, kept_picture, key_picture, scale_of
from kvfold.report.pictures.memory import memory_picture
from kvfold.report.pictures.quality import axes_of, quality_pictures
from kvfold.report.pieces import behind, figure, protocol_text, section, source_line, table
from kvfold.report.results import number
from kvfold.report.series import family_of, label_of, quality_lines, texts_of
from kvfold.report.sheets import decode_sheet, kept_sheets, memory_sheet, plan_sheet, quality_sheet
from kvfold.report.summary import summary_table
from kvfold.specs.registry import TIME_SPECS
