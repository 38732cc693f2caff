"""Accounts and their users."""

from typing import Any

from fastapi import APIRouter, HTTPException, status
from sqlalchemy.exc import IntegrityError

from crm.auth import CurrentUser, digest, new_key
from crm.database import DatabaseSession
from crm.models import Account, User
from crm.schemas import AccountIn, NewUserOut, UserIn, UserOut

router = APIRouter(tags=["users"])


@router.post("/accounts", status_code=status.HTTP_201_CREATED)
async def create_account(given: AccountIn, session: DatabaseSession) -> NewUserOut:
    account = Account(name=given.account)
    session.add(account)
    await session.flush()
    return await _create_user(given, account.id, session)


@router.post("/users", status_code=status.HTTP_201_CREATED)
async def create_colleague(given: UserIn, session: DatabaseSession, user: CurrentUser) -> NewUserOut:
    return await _create_user(given, user.account_id, session)


@router.get("/users/me", response_model=UserOut)
async def who_am_i(user: CurrentUser) -> Any:
    return user


async def _create_user(given: UserIn, account_id: int, session: DatabaseSession) -> NewUserOut:
    key = new_key()
    user = User(account_id=account_id, name=given.name, email=given.email, key_digest=digest(key))
    session.add(user)
    try:
        await session.commit()
    except IntegrityError as error:
        raise HTTPException(status.HTTP_409_CONFLICT, "this address has a user already") from error
    return NewUserOut(**UserOut.model_validate(user).model_dump(), key=key)
