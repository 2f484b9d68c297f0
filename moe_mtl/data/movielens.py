"""MovieLens: whether a user watched a movie, and how the user rated it.

Source: Harper and Konstan 2015, https://grouplens.org/datasets/movielens (ml-latest-small; folders of the same format,
such as ml-latest, are read too). Tasks as in Hazimeh et al. 2021 (DSelect-k). Its licence forbids commercial use.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import Source, TableData, random_parts
from moe_mtl.tasks import Task

if TYPE_CHECKING:
    from pandas import DataFrame

FOLDS = 10  # of the training ratings, where statistics for a row come from the other folds
DAMPING = 5.0  # ratings at the overall mean that a user's or movie's mean starts from


@dataclass(frozen=True, kw_only=True)
class MovieLens(TableData):
    """MovieLens.

    Tasks: `watch`, binary, 1 for a rated movie and 0 for one drawn at random among those the user never rated;
    `rating`, a regression in stars, 0.5 to 5, missing for movies not watched.

    Inputs: user and movie, the movie's genres and year, and how often and how well user and movie are rated. These come
    from training ratings alone, for a training row from those of other folds. `watch` is also measured per user, by
    `grouped_auc`.

    Splits: of the ratings; a negative belongs to the split of the rating it was drawn for.

    Attributes:
        root: the folder with ratings.csv and movies.csv (or .csv.gz).
        negatives: movies not watched per rating.
        split_by: "random", 80/10/10, or "time", the last 10 % of every user's ratings for testing and the 10 % before
            for validation.
        seed: of the draws.
    """

    root: str | None = None
    negatives: int = 1
    split_by: Literal["random", "time"] = "random"
    seed: int = 0

    def source(self) -> Source:
        """Reads the files and draws the negatives.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: no folder is named, or a setting is out of range.
        """
        import pandas

        if self.negatives < 1:
            raise ValueError(f"negatives: got {self.negatives}, expected at least 1; watch needs both classes")
        ratings = self._read("ratings", ("userId", "movieId", "rating", "timestamp"))
        movies = self._read("movies", ("movieId", "title", "genres"))
        parts = self._parts(ratings)
        pairs = ratings[["userId", "movieId"]].to_numpy()
        drawn = self._draw(pairs, np.unique(pairs[:, 1]))
        every = np.concatenate([pairs, drawn])
        part = np.concatenate([parts, np.repeat(parts, self.negatives)])
        stars = np.concatenate([ratings["rating"].to_numpy(np.float64), np.full(len(drawn), np.nan)])
        frame = pandas.DataFrame({"user": every[:, 0], "movie": every[:, 1]})
        about = movies.set_index("movieId").reindex(every[:, 1])
        genres = about["genres"].fillna("").replace("(no genres listed)", "")
        frame["genres"] = genres.to_numpy()
        frame["year"] = about["title"].str.extract(r"\((\d{4})\)\s*$")[0].astype(float).to_numpy()
        learned = part == "train"
        folds = np.random.default_rng(self.seed).integers(FOLDS, size=len(pairs))
        fold = np.where(learned, np.concatenate([folds, np.repeat(folds, self.negatives)]), -1)
        for name in ("user", "movie"):
            mean, count = damped_means(frame[name].to_numpy(), stars, fold)
            frame[f"{name}_mean"], frame[f"{name}_count"] = mean, np.log1p(count)
        own = stars[learned & ~np.isnan(stars)]
        return Source(
            features=frame,
            labels={"watch": (~np.isnan(stars)).astype(np.float64), "rating": stars},
            part=part,
            tasks=(
                Task.binary("watch", metrics={"auc": {}, "grouped_auc": {"by": "user_id"}, "log_loss": {}}),
                Task.regression("rating", mean=float(own.mean()), std=float(own.std())),
            ),
            kinds={"user": "categorical", "movie": "categorical", "genres": "multihot"},
            extra={"user_id": every[:, 0]},
        )

    def _read(self, name: str, columns: tuple[str, ...]) -> "DataFrame":
        import pandas

        if self.root is None:
            raise ValueError("root: name the folder with ratings.csv and movies.csv, as --data.root=FOLDER")
        found = [Path(self.root) / f"{name}.csv{end}" for end in ("", ".gz")]
        path = next((p for p in found if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"root: {found[0]} is missing")
        frame = pandas.read_csv(path)
        if lacking := [column for column in columns if column not in frame]:
            raise ValueError(f"root: {path} ({len(frame)} rows) has no column {', '.join(lacking)}")
        return frame

    def _parts(self, ratings: "DataFrame") -> NDArray:
        if self.split_by == "random":
            return random_parts(len(ratings), 0.1, 0.1, self.seed)
        ordered = ratings.sort_values(["userId", "timestamp", "movieId"])
        rank = ordered.groupby("userId").cumcount(ascending=False).reindex(ratings.index).to_numpy()
        tenth = np.ceil(0.1 * ratings.groupby("userId")["rating"].transform("size").to_numpy())
        return np.where(rank < tenth, "test", np.where(rank < 2 * tenth, "val", "train"))

    def _draw(self, pairs: NDArray, movies: NDArray) -> NDArray:
        """A row [user, movie] per rating and negative, of movies the user never rated in any split."""
        generator = np.random.default_rng(self.seed)
        users = np.repeat(pairs[:, 0], self.negatives)
        size = int(movies.max()) + 1
        seen = set((pairs[:, 0] * size + pairs[:, 1]).tolist())
        chosen = movies[generator.integers(len(movies), size=len(users))]
        while True:
            again = np.array([key in seen for key in (users * size + chosen).tolist()])
            if not again.any():
                return np.stack([users, chosen], axis=1)
            chosen[again] = movies[generator.integers(len(movies), size=int(again.sum()))]


def damped_means(of: NDArray, stars: NDArray, fold: NDArray) -> tuple[NDArray, NDArray]:
    """Mean rating of each row's user (or movie), drawn to the overall mean by `DAMPING` ratings, and their number.

    A training row knows the training ratings of the other folds alone, so neither its own rating nor whether it is one
    can be read off what the others have; other rows know all of them.

    Args:
        of: the user (or movie) of every row.
        stars: ratings, NaN where there is none.
        fold: of the training rows, 0..`FOLDS` - 1; -1 for rows of other splits.
    """
    _, ids = np.unique(of, return_inverse=True)
    used = (fold >= 0) & ~np.isnan(stars)
    value = np.where(used, stars, 0.0)
    total, count = np.bincount(ids, value)[ids], np.bincount(ids, used)[ids]
    cell = ids * (FOLDS + 1) + fold + 1  # of a user and fold; that of fold -1 holds no rating
    total, count = total - np.bincount(cell, value)[cell], count - np.bincount(cell, used)[cell]
    overall = value.sum() / max(1, used.sum())
    return (total + DAMPING * overall) / (count + DAMPING), count
