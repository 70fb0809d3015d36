"""Operators without a derivative: constant almost everywhere, or not numbers at all.

A path through one of these ends there; if no other path joins ``of`` and ``wrt``, the walk refuses.
"""

from __future__ import annotations

NO_DERIVATIVE: frozenset[tuple[str, str]] = frozenset(
    ("", name)
    for name in (
        # comparisons and logic
        "Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not IsNaN IsInf "
        "BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor "
        # piecewise constant
        "Sign Floor Ceil Round Hardmax ArgMax ArgMin NonZero EyeLike "
        # shape arithmetic
        "Shape Size ConstantOfShape Constant Range "
        # random numbers and selections of boxes
        "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial "
        "NonMaxSuppression "
        # text
        "StringNormalizer StringConcat StringSplit RegexFullMatch TfIdfVectorizer"
    ).split()
) | frozenset(
    ("ai.onnx.ml", name)
    for name in (
        "TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor ArrayFeatureExtractor "
        "Binarizer CategoryMapper DictVectorizer LabelEncoder OneHotEncoder ZipMap"
    ).split()
)
